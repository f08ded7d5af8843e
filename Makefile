# What README tells people to call. `setup` makes .venv once and again only when pyproject.toml changes; the others call it.
#   make setup | demo | test | test-long | check | bench
#   make setup PYTHON=/path/to/python     another interpreter (3.11 or newer)
#   make setup TORCH="torch==2.13.0 --index-url URL"     another build of torch
#   make bench ARGS="--policies affinity,mobius"

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

is_new_enough = $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
PYTHON ?= $(shell for python in python3.11 python3; do \
	if $(call is_new_enough,$$python); then echo $$python; break; fi; done)
# Without a GPU this must be asked for by itself and first: torch as somebody's dependency may bring gigabytes of CUDA.
TORCH ?= $(shell if nvidia-smi >/dev/null 2>&1; then echo "'torch<2.14'"; else echo torch==2.13.0; fi)
# The tests are tiny and two run at a time: more threads each would only fight over the cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: setup demo test test-long check bench

setup: $(STAMP)

$(STAMP): pyproject.toml
	@if [ -z "$(PYTHON)" ] || ! $(call is_new_enough,$(PYTHON)); then \
		echo "isthmus needs CPython 3.11 or newer, and '$(or $(PYTHON),python3)' is not: install it" \
			"(Debian: apt-get install python3.11 python3.11-venv) or say make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[data,dev]'
	@touch $(STAMP)

demo: setup
	$(BIN)/isthmus demo $(ARGS)

test: setup
	$(PYTEST) -m "not long" $(ARGS)

test-long: setup
	$(PYTEST) -m long $(ARGS)

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: setup
	$(BIN)/isthmus bench tune --report out/bench.json $(ARGS)
