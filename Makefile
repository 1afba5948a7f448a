# Needs only make and Python >= 3.11. `make` alone lists the targets.
# Without make: see the equivalents in README.md.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
NAMES ?=
ROUNDS ?= 5

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
VIZ := $(VENV)/.installed-viz
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench

.DEFAULT_GOAL := help
.PHONY: help demo test check bench table tutorials clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/'

demo: $(VIZ) ## fit a real data set by em, map-em and svi; print, and write NetCDF and PNG files
	$(BIN)/python benchmarks/demo.py

test: $(DEV) ## run the tests, warnings as errors (WORKERS=2)
	$(BIN)/python -m pytest -n $(WORKERS) -q

check: $(DEV) ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pyro_em

bench: $(BENCH) ## time the workloads in benchmarks/ against other libraries (NAMES="A1 D", ROUNDS=5)
	$(BIN)/python -m benchmarks.run $(NAMES) --rounds $(ROUNDS)
	$(BIN)/python -m benchmarks.draw

table: $(DEV) ## print the table of algorithms that stands in README.md
	$(BIN)/python benchmarks/flag_table.py

tutorials: $(DEV) ## run the tutorials and write their notebooks
	$(BIN)/python tutorials/execute.py

clean: ## remove the environment, caches and build products
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pyro_em needs Python >= 3.11; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# torch is asked for by its exact version, and first: an open range may resolve to gigabytes of CUDA.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@touch $@

# The stamps keep an environment that is up to date from being built again.
$(VIZ): $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[viz]'
	@touch $@

$(DEV): $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(BENCH): $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[bench]'
	@touch $@
