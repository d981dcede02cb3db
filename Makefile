# Every target works on a machine that has Python 3.11+ and make, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS := $(VENV)/.runs

.PHONY: run test coverage check lint fuzz test-slow test-gpu torture bench wheel clean

# One environment, built from pyproject.toml under constraints.txt; rebuilt when either changes. Running takes
# what the package itself needs; every other target adds what tests, checks and benchmarks need.
$(RUNS): WHAT := .
$(STAMP): WHAT := .[dev]
$(RUNS) $(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '$(WHAT)'
	touch $(RUNS) $@

run: $(RUNS)
	$(BIN)/hydra-pipe run --shards 8

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(COUNTED)

# The same tests, with the lines of the rooms that they run counted: nearly half more processor time.
coverage: COUNTED := --cov --cov-fail-under=97
coverage: test

check: lint
	$(BIN)/python -m pytest tests/test_architecture.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# More than 2,000 inputs, others each time.
fuzz: $(STAMP)
	HYDRA_PIPE_FUZZ=300 $(BIN)/python -m pytest tests/test_fuzz.py

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# Stored runs damaged and drivers disturbed, by the hundred; half an hour and more.
torture: $(STAMP)
	$(BIN)/python -m tests.torture

bench: $(STAMP)
	$(BIN)/python -m benchmarks

wheel: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
