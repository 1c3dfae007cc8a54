# `make serve` and `make test` set up everything they need in .venv.
# Python 3.12 or newer is the only thing that must be there: PYTHON=/path/to/python to choose one.
PYTHON ?= $(shell command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS := --disable-pip-version-check --quiet --constraint constraints.txt
# Flags for lumen-serve: make serve FLAGS="--model=DIR --replicas=1". On a GPU: make serve EXTRA=cuda.
FLAGS ?=
EXTRA ?=

.PHONY: serve test test-all check lint types protos clean

serve: $(VENV)/.installed-$(or $(EXTRA),base)
	$(BIN)/lumen-serve $(FLAGS)

# Kernels run in interpreters and ahead-of-time compilers, one core each: these go side by side.
KERNEL_TESTS := tests/kernels tests/aot

test: check
	$(BIN)/python -m pytest -m "not slow" --numprocesses=2 $(KERNEL_TESTS)
	$(BIN)/python -m pytest -m "not slow" $(addprefix --ignore=,$(KERNEL_TESTS))

test-all: check
	$(BIN)/python -m pytest --numprocesses=2 $(KERNEL_TESTS)
	$(BIN)/python -m pytest $(addprefix --ignore=,$(KERNEL_TESTS))

check: lint types

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy lumen serving kernels tools

protos: $(VENV)/.installed-dev
	$(BIN)/python tools/generate_protos.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "Lumen needs Python 3.12 or newer; $(PYTHON) is older. Name one: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-base: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Lumen into $(VENV) (a minute or two, once)"
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Lumen with its '$*' extra into $(VENV) (a minute or two, once)"
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV)
