# `make demo` and `make test` need Python 3.11 or newer (on Debian: python3 and python3-venv) and nothing else.
PYTHON ?= python3
# Processes that run tests side by side. Each imports TensorFlow, so more of them want more memory, too.
TEST_WORKERS ?= 2
# More arguments for pytest, such as PYTEST_ARGS="tests/model -k resnet".
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help .venv .venv-dev demo test test-servers lint format clean

help:
	@echo "make demo    make a data set, train, evaluate, export and predict, in demo/"
	@echo "make test    run all tests"
	@echo "make test-servers  run the tests of 'deeplab2-like serve', with MLServer in .venv-servers"
	@echo "make lint    ruff check, ruff format --check, mypy"
	@echo "make format  fix what ruff can fix"
	@echo "make clean   remove $(VENV) and everything that tools leave behind"

demo: $(VENV)/installed
	$(BIN)/deeplab2-like demo --output-dir demo

# A process keeps each program that XLA has compiled for it until it ends, so the tests of the networks, which compile
# most of them, have processes of their own.
PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile
test: $(VENV)/installed-dev
ifeq ($(strip $(PYTEST_ARGS)),)
	$(PYTEST) --durations=10 tests/model
	$(PYTEST) --durations=10 --ignore=tests/model
else
	$(PYTEST) $(PYTEST_ARGS)
endif

# MLServer does not install beside every other extra, so it has an environment of its own.
test-servers: .venv-servers/installed
	CUDA_VISIBLE_DEVICES=-1 .venv-servers/bin/python -m pytest --noconftest tests/servers/check_mlserver.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-servers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv: $(VENV)/installed

.venv-dev: $(VENV)/installed-dev

# The stamps are written last, so that an installation that was cut short is taken up again.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with 'make PYTHON=python3.11 ...'." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "Python's 'venv' is missing; on Debian: apt install python3-venv" >&2; exit 1; }

$(VENV)/installed: pyproject.toml setup.py | $(BIN)/python
	@echo "Installing into $(VENV); this downloads TensorFlow and takes some minutes the first time."
	$(PIP) install --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install --editable '.[dev]'
	@touch $@

.venv-servers/installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv-servers
	.venv-servers/bin/python -m pip --disable-pip-version-check --quiet install --editable '.[mlserver,serving]' pytest
	@touch $@
