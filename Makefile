# `make run` and `make test` set up everything that they need in .venv. With PYTHON=… the given interpreter is used as
# it is and nothing is installed.
.DEFAULT_GOAL := help
.PHONY: help run test test-all test-gpu test-torch sanitize soak lint

BASE_PYTHON ?= python3
ARGS ?=
# Of the tests: a number, or auto, one for each core that the machine grants. Each begins with a stretch of successive files,
# whose fixtures it builds once; who has finished takes from the end of the longest queue.
WORKERS ?= auto
PYTEST = $(PYTHON) -m pytest -q
BESIDE = -n $(WORKERS) --dist worksteal

ifeq ($(origin PYTHON), undefined)
PYTHON := .venv/bin/python
SETUP := .venv/installed
endif
# For an interpreter in which the package is not installed.
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(CURDIR)/runner$(if $(PYTHONPATH),:$(PYTHONPATH))

help:  ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12
	@echo 'variables:  ARGS="model=small"  what `make run` passes on;  PYTHON=python3  use this one, install nothing'
	@echo '           WORKERS=4  tests beside each other; auto: one for each core;  TORCH=2.14.0  which torch `make test-torch` takes'

run: $(SETUP)  ## decode the shipped model on this machine, check and measure it
	$(PYTHON) -m moeexp $(ARGS)

test: $(SETUP)  ## the quick tests, on the CPU
	$(PYTEST) $(BESIDE) -m "not slow and not gpu"

test-all: $(SETUP)  ## every test that needs no GPU
	$(PYTEST) $(BESIDE) -m "not gpu"

test-gpu: $(SETUP)  ## the tests that need a GPU
	$(PYTEST) $(BESIDE) -m "gpu and not alone"; beside=$$?; $(PYTEST) -m "gpu and alone" && exit $$beside

# In an environment of its own, with the other packages as they are pinned: torch brings the triton that belongs to it.
test-torch: $(if $(TORCH),.venv-torch-$(TORCH)/installed)  ## nano through every export and dispatch on the torch of TORCH=…
	@test -n "$(TORCH)" || { echo "make test-torch needs a version: make test-torch TORCH=2.14.0"; exit 2; }
	.venv-torch-$(TORCH)/bin/python -m pytest -q $(BESIDE) tests/test_exports.py

sanitize: $(SETUP)  ## every kernel's smallest shapes and a captured decode under compute-sanitizer, on a GPU
	$(PYTHON) tests/gpu/sanitize.py

soak: $(SETUP)  ## eight minutes of decoding at full size: does anything grow, drift or change? On a GPU; ARGS="--out results/soak_h100"
	$(PYTHON) tests/gpu/soak.py $(ARGS)

lint: $(SETUP)  ## static checks, the formatter's, and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# hqq comes as source only and would otherwise look for a CUDA toolkit; we use its Python quantiser alone.
.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(BASE_PYTHON) -m venv .venv
	DISABLE_CUDA=1 .venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv-torch-%/installed: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(BASE_PYTHON) -m venv $(@D)
	grep -vE '^(torch|triton)==' constraints.txt > $(@D)/constraints.txt
	DISABLE_CUDA=1 $(@D)/bin/python -m pip install -q -c $(@D)/constraints.txt -e '.[dev]' torch==$*
	touch $@
