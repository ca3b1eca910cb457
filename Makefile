# Needs make and Python 3.10 or newer. Everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
# Whole files of tests at once, one thread each: several threads help so small models little.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-all lint format type bench torture lines all-keys smollm2 clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# A stamp is written last, so an interrupted install is done again.
.venv/.runtime: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "error: '$(PYTHON)' is not Python 3.10 or newer; try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -e . --no-deps
	@touch $@

.venv/.dev: .venv/.runtime requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

venv: .venv/.dev ## Make .venv with everything for running and developing

quickstart: .venv/.runtime ## Train the small model on CPU, then test it with and without memory
	$(BIN)/python train.py fit --config configs/quickstart.yaml

test: .venv/.dev ## Run the tests, except the slow ones
	$(PYTEST) -m "not slow"

test-all: .venv/.dev ## Run all tests
	$(PYTEST)

lint: .venv/.dev ## Check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: .venv/.dev ## Mend style and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

type: .venv/.dev ## Check types
	$(BIN)/mypy

bench: .venv/.dev ## Measure the searches and whole training steps (half an hour)
	$(BIN)/python benchmarks/search.py --out runs/bench
	$(BIN)/python benchmarks/step.py --out runs/bench

torture: .venv/.dev ## Kill 50 runs at random moments, resume each, compare bit by bit (minutes)
	$(BIN)/python benchmarks/torture.py

lines: ## Count the lines of code of each room
	@$(PYTHON) tools/lines.py

all-keys: .venv/.dev ## Write configs/all-keys.yaml again, after a key or its help changed
	$(BIN)/python tools/all_keys.py

smollm2: .venv/.dev ## Make data/models/smollm2-135m, a pretrained model of 135M weights
	$(BIN)/python -m pip install --disable-pip-version-check --quiet gguf==0.19.0 accelerate==1.15.0
	$(BIN)/python tools/smollm2.py

clean: ## Remove caches; .venv, runs/ and data/ stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache build
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
