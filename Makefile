# make quickstart   train on real digits, sample, measure: out/quickstart/
# make test         the whole test suite
# make test-newest  the laws of the core on the newest Python that is found
# make lint         ruff, the layers of the packages, the types, and what the last make test cost
# make test-peers   parity with torch, diffusers and transformers
# make bench        side-by-side timings against the same peers
# make first-day    a user's first day, from the wheel alone, in an empty folder
# make report     the pages of docs/systems from the reports of the studies
# Each makes its own virtual environment from nothing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
TESTS ?=
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

# The packages of Python 3.12 and later are a generation newer than those of 3.11. What leans on them most: programs as
# jax has them, meshes, flax's collections, checkpoints, and laws about rounding.
CORE := $(addprefix tests/,processes timesteps solvers distributed test_sampling.py test_costs.py \
  $(patsubst %,training/test_%.py,step optimizers ema checkpoint) \
  $(patsubst %,models/test_%.py,mlp layers dit interception))
NEWEST = $(shell for minor in 14 13 12; do \
  for python in python3.$$minor "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.$$minor.*/bin/python; do \
    "$$python" -c 'import ensurepip, venv' 2>/dev/null && echo "$$python" && exit; \
  done; done)
MINOR := -c 'import sys; print("%d.%d" % sys.version_info[:2])'

.PHONY: quickstart test test-newest same-python lint test-peers first-day bench report clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: $$($(PYTHON) --version) was found. Use make PYTHON=python3.x" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# An environment keeps the Python that it was made with.
same-python: $(BIN)/python
ifneq ($(origin PYTHON),file)
	@wanted=$$($(PYTHON) $(MINOR)) && found=$$($(BIN)/python $(MINOR)) || exit 2; [ $$wanted = $$found ] \
	  || { echo "$(VENV) has Python $$found, but $(PYTHON) is $$wanted: remove it or use another VENV=..." >&2; exit 2; }
endif

$(VENV)/.installed: setup.py | same-python
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: setup.py | same-python
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-peers: setup.py $(VENV)/.installed-test
	$(PIP) --editable '.[peers,test]'
	$(PIP) --no-deps clean-fid torch-fidelity
	@touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python -m diffusion_jax.train --config=digits_dit --workdir=out/quickstart
	$(BIN)/python -m diffusion_jax.sample --workdir=out/quickstart --num-samples=1000 --save-trajectory
	$(BIN)/python -m diffusion_jax.evaluate --workdir=out/quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not peers' $(TESTS)

test-newest:
	@python='$(NEWEST)'; if [ -n "$$python" ]; \
	  then $(MAKE) test VENV=.venv-newest PYTHON="$$python" TESTS='$(CORE)'; \
	  else echo "test-newest is left out: no Python 3.12 or later with venv was found."; fi

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python --warnings
	$(BIN)/python -m tests.budget

test-peers: $(VENV)/.installed-peers
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m peers

first-day: $(VENV)/.installed-test
	$(BIN)/python -m tests.first_day

bench: $(VENV)/.installed-peers
	$(BIN)/python -m benchmarks.run

report: $(VENV)/.installed
	$(BIN)/python -m diffusion_jax.recipes --write-pages

clean:
	rm -rf $(VENV) .venv-newest .cache out build *.egg-info
