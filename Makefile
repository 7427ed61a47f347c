# Everything happens in .venv of this checkout; pip's own settings (PIP_INDEX_URL, ...) apply.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-gpu test-verl test-fuzz lint types format bench bench-flashtrace bench-trl soak kill evidence evidence-full wheel clean

PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
READY := .venv/.ready

# verl wants another transformers than the rest of the project, hence an environment of its own. What it imports is
# named here, and verl itself comes without its dependencies: these bring CUDA, vLLM or SGLang, which no test needs.
VERL_VENV ?= .venv-verl
VERL_BIN := $(VERL_VENV)/bin
VERL_READY := $(VERL_VENV)/.ready
VERL_NEEDS := accelerate cachetools codetiming datasets dill fastapi hydra-core pandas peft pillow pyarrow ray \
  tensordict torchdata TransferQueue transformers uvicorn torch-geometric scipy pytest hypothesis

# FlashTrace, which the benchmarks compare with: without its dependencies, which would bring CUDA, but with what it
# imports, in the versions that the rest of the project has too.
FLASHTRACE_VENV := .venv-flashtrace
FLASHTRACE_BIN := $(FLASHTRACE_VENV)/bin
FLASHTRACE_READY := $(FLASHTRACE_VENV)/.ready
FLASHTRACE_NEEDS := accelerate matplotlib networkx numpy seaborn==0.13.2 spacy==3.8.18 tqdm transformers wordfreq==3.1.1

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

test-verl: $(VERL_READY)  ## the tests against the real verl, in an environment of their own (.venv-verl)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VERL_BIN)/python -m pytest -q tests/verl $(PYTEST_ARGS)

$(VERL_READY): pyproject.toml constraints-verl.txt
	@test -x $(VERL_BIN)/python || { echo "Making $(VERL_VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VERL_VENV); }
	@echo "Installing torch, then what verl imports"
	@$(VERL_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-verl.txt torch
	@$(VERL_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-verl.txt torch $(VERL_NEEDS)
	@$(VERL_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-verl.txt --no-deps verl
	@$(VERL_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

test-fuzz: setup  ## hostile input for five minutes
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 FLOWGRAPH_FUZZ_SECONDS=260 $(BIN)/python -m pytest -q tests/fuzz $(PYTEST_ARGS)

lint: setup  ## ruff: rules and layout of the code
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted: run 'make format'"; exit 1; }

types: setup  ## mypy
	@$(BIN)/mypy --no-error-summary

format: setup  ## let ruff lay out and mend the code
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

bench: setup $(FLASHTRACE_READY)  ## run the benchmarks (50 minutes); goes on where a run was stopped
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.run

bench-flashtrace: $(FLASHTRACE_READY)  ## make the environment of FlashTrace, which bench compares with

$(FLASHTRACE_READY): constraints.txt
	@test -x $(FLASHTRACE_BIN)/python || { echo "Making $(FLASHTRACE_VENV) with $(PYTHON)"; $(PYTHON) -m venv $(FLASHTRACE_VENV); }
	@echo "Installing torch, then FlashTrace and what it imports"
	@$(FLASHTRACE_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(FLASHTRACE_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch $(FLASHTRACE_NEEDS)
	@$(FLASHTRACE_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps flashtrace==0.1.1
	@touch $@

bench-trl: setup  ## time steps of TRL with and without credits (half an hour)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.trl_step

soak: setup  ## score short rows for an hour: memory, rate, counts
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.soak $(SOAK_ARGS)

kill: setup  ## kill 40 jobs of scoring and compare with an undisturbed one
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.kill

evidence: setup  ## rebuild the tables and pictures of docs/evidence.md from the logs
	@$(BIN)/python -m benchmarks.evidence.page

evidence-full: setup  ## run all that docs/evidence.md is made of (hours; goes on with the logs that are there)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.evidence.decoders
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.evidence.recall
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.evidence.choices
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.evidence.gsm8k
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rl_gain
	@$(BIN)/python -m benchmarks.evidence.page

wheel: setup  ## build the wheel and the source archive into dist/
	@$(BIN)/python -m build --outdir dist .

clean:  ## remove what was built; keeps .venv and the cached model
	@rm -rf build dist out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov
	@find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
