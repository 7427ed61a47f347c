# Everything happens in .venv of this checkout; pip's own settings (PIP_INDEX_URL, ...) apply.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-gpu test-scatter test-verl test-fuzz lint types format bench bench-gpu bench-flashtrace bench-trl soak kill evidence evidence-full wheel clean

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

# torch-scatter is built here: its makers offer no wheel for every torch, so one is made for the torch of .venv, once, and
# kept. It goes into a folder of its own, so that all other tests run without it.
SCATTER := torch-scatter==2.1.2
SCATTER_READY := .torch-scatter/.ready
WHEELS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/flowgraph/wheels

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

test-scatter: $(SCATTER_READY)  ## the tests of solves with torch-scatter (the first time builds it: ten minutes)
	@OMP_NUM_THREADS=1 PYTHONPATH=.torch-scatter $(BIN)/python -m pytest -q tests/test_backends.py $(PYTEST_ARGS)
	@OMP_NUM_THREADS=1 PYTHONPATH=.torch-scatter FLOWGRAPH_SOLVERS=scatter:torch_scatter \
	  $(BIN)/python -m pytest -q tests/test_laws.py $(PYTEST_ARGS)

$(SCATTER_READY): $(READY)
	@folder="$(WHEELS)/torch-$$($(BIN)/python -c 'import torch; print(torch.__version__)')"; mkdir -p "$$folder"; \
	  pip="$(BIN)/python -m pip --disable-pip-version-check --quiet"; \
	  echo "Building $(SCATTER), unless its wheel lies in $$folder"; \
	  $$pip wheel --no-build-isolation --no-deps --find-links "$$folder" --wheel-dir "$$folder" $(SCATTER) && \
	  rm -rf .torch-scatter && $$pip install --no-deps --no-index --find-links "$$folder" --target .torch-scatter $(SCATTER)
	@touch $@

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

bench-gpu: setup  ## measure all of docs/gpu.md on this GPU, for 8 minutes; goes on where a run was stopped
	@HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.gpu

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

evidence-full: setup $(FLASHTRACE_READY)  ## run all that docs/evidence.md is made of (hours; goes on with the logs that are there)
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
