# Rooflight: `make help` says what each target does. Every target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# The tests' own parallelism is one process a core; more threads in each would only contend.
WORKERS ?= auto

.PHONY: help setup demo test test-slow lint clean

help:
	@echo "make setup      make $(VENV) with everything in it"
	@echo "make demo       probe this machine, price an 8B model on an H200, train a small one here, serve it, compare"
	@echo "make test       the tests (CPU, a few minutes)"
	@echo "make test-slow  the long tests too"
	@echo "make lint       ruff and pyright"

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	@echo "setting up $(VENV) (downloads PyTorch the first time)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@

demo: setup
	@echo "demo: probe, explain, train for a minute, measure, serve (about five minutes on 2 cores)"
	$(BIN)/python examples/demo.py

test: setup
	@echo "running the tests; those marked slow run with make test-slow, those marked gpu with pytest -m gpu"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m 'not gpu'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build *.egg-info
