# Every target makes its own .venv first. Needs only make and Python 3.11 or newer.
# Settings: PYTHON=/path/to/python3, PIP_FLAGS="...", PYTEST_FLAGS="...".

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-full check lint bench docs clean

BIN := .venv/bin
READY := .venv/.ready
ifdef PYTHON
PYTHONS = "$(PYTHON)"
else
PYTHONS = python3 python3.14 python3.13 python3.12 python3.11
endif

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## Train a small LongNet on real text, in about 2 minutes on 2 cores; results in runs/
	$(BIN)/dilated-attention train --preset demo

test: $(READY) ## Run the tests (those for a GPU only where there is one)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-full: $(READY) ## Run every test, long campaigns too
	$(BIN)/python -m pytest -m "" -o timeout=7200 $(PYTEST_FLAGS)

check: lint docs test ## Everything that has to pass before a commit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) ## Measure speed on this CPU, and on the GPU where there is one; results in benchmarks/results
	$(BIN)/python benchmarks/cpu.py
	@if $(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then \
	  set -x; $(BIN)/python benchmarks/gpu.py; \
	else \
	  echo "no CUDA device: benchmarks/gpu.py not run"; \
	fi

docs: $(READY) ## Build the documentation in site/
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean: ## Remove .venv, caches and build products; keep runs/
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || { \
	  for python in $(PYTHONS); do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	      echo "Making .venv with $$python"; \
	      exec "$$python" -m venv --clear .venv; \
	    fi; \
	  done; \
	  echo "make: none of these is Python 3.11 or newer with venv:" $(PYTHONS) >&2; \
	  echo "make: install one (on Debian and Ubuntu also python3-venv), or name one: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	@echo "Installing into .venv; PyTorch is large, so this can take some minutes"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@
