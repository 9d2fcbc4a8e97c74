# make demo   a picture chat on a real SGLang server on this machine's CPU, with most of the picture's KV evicted
# make test   every test but the long ones
# Each target sets up what it needs: a virtual environment in .venv (VENV=DIR for another place), made once and
# brought up to date when pyproject.toml or constraints.txt change.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
STAMP := $(VENV)/.tgvkv-stamp
# Tests at the same time: each worker has live servers of its own, some 4 GB. A file's tests stay together.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
export TORCH_COMPILE_DISABLE := 1

.PHONY: help demo test test-fast lint clean venv

help:
	@echo "make demo       chat about a picture, 100 % of its KV beside 5 %   (ARGS='--turns 8 --policy tgv')"
	@echo "make test       all tests but the long ones                       (ARGS='-x' WORKERS=2)"
	@echo "make test-fast  the tests that need neither SGLang nor Triton's interpreter"
	@echo "make lint       ruff"
	@echo "make clean      remove caches and build output (never the virtual environment)"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt .ci/venv
	@.ci/venv "$(VENV)"
	@touch "$@"

demo: $(STAMP)
	@"$(VENV)/bin/tgvkv" demo $(ARGS)

# The tests' models are tiny: more threads than one only wait for each other.
test: export OMP_NUM_THREADS := 1
test: $(STAMP)
	@"$(VENV)/bin/python" -m pytest -m "not long" $(PARALLEL) $(ARGS)

test-fast: $(STAMP)
	@"$(VENV)/bin/python" -m pytest $(addprefix --ignore tests/,server seam kernels) -m "not long and not model" $(ARGS)

lint: $(STAMP)
	@"$(VENV)/bin/ruff" check .

clean:
	@find . -name .git -prune -o -path "./$(VENV)" -prune -o -type d \
	    \( -name __pycache__ -o -name .pytest_cache -o -name .ruff_cache -o -name .hypothesis \) -prune -exec rm -rf {} +
	@rm -rf build dist *.egg-info
