# make quickstart   train on real digits, sample, measure: out/quickstart/
# make test         the whole test suite
# make lint         ruff and the floors of the house
# make test-peers   parity with torch, diffusers and transformers
# make bench        side-by-side timings against the same peers
# make report       docs/systems.md from the recipes' reports
# Each makes its own virtual environment from nothing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: quickstart test lint test-peers bench report clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: $$($(PYTHON) --version) was found. Use make PYTHON=python3.x" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: setup.py | $(BIN)/python
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-peers: setup.py $(VENV)/.installed-test
	$(PIP) --editable '.[peers,test]'
	@touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python -m diffusion_jax.train --config=configs/digits_dit.py --workdir=out/quickstart
	$(BIN)/python -m diffusion_jax.sample --workdir=out/quickstart --num-samples=1000 --save-trajectory
	$(BIN)/python -m diffusion_jax.evaluate --workdir=out/quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not peers'

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

test-peers: $(VENV)/.installed-peers
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m peers

bench: $(VENV)/.installed-peers
	$(BIN)/python -m benchmarks.run

report: $(VENV)/.installed
	$(BIN)/python -m diffusion_jax.recipes --write-table docs/systems.md

clean:
	rm -rf $(VENV) .cache out build *.egg-info
