# Everything a fresh machine needs is installed into .venv by `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet -c constraints.txt

.PHONY: demo test lint bench install dev clean

# torch first and alone: a bare torch would bring gigabytes of CUDA packages
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	# checks the installation and compiles the kernels, which takes half a minute once
	$(BIN)/fewbits doctor
	touch $@

# the real engine; it is compiled, which takes about five minutes on two cores
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[dev,llama]"
	touch $@

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

demo: install
	$(BIN)/fewbits demo

test: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: dev
	$(BIN)/python benchmarks/encode.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build
