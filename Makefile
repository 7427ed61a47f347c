# Everything happens in .venv of this checkout; pip's own settings (PIP_INDEX_URL, ...) apply.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-gpu lint types format bench wheel clean

PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
READY := .venv/.ready

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv with everything that the other targets need

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "Making .venv with $(PYTHON)"; $(PYTHON) -m venv .venv; }
	@echo "Installing torch (the largest part: minutes on a slow line)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@echo "Installing FlowGraph and its tools"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup  ## trace real reasoning with a real model and leave a page to look at
	@$(BIN)/flowgraph demo

test: lint types  ## lint, type check and every test that is neither long nor for a GPU
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "not slow and not gpu" $(PYTEST_ARGS)

test-long: setup  ## the long tests
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "slow and not gpu" $(PYTEST_ARGS) \
	  || { code=$$?; test $$code -eq 5 && echo "There are no long tests." || exit $$code; }

test-gpu: setup  ## the tests that need a CUDA device
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m gpu $(PYTEST_ARGS)

lint: setup  ## ruff: rules and layout of the code
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted: run 'make format'"; exit 1; }

types: setup  ## mypy
	@$(BIN)/mypy --no-error-summary

format: setup  ## let ruff lay out and mend the code
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

bench: setup  ## run the benchmarks
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.run

wheel: setup  ## build the wheel and the source archive into dist/
	@$(BIN)/python -m build --outdir dist .

clean:  ## remove what was built; keeps .venv and the cached model
	@rm -rf build dist out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov
	@find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
