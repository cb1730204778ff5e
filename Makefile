# Each target stands alone: it makes .venv and installs the package when they are not there yet.
PYTHON ?= python3
BIN := .venv/bin
# Processes that run the quick tests, one thread each; `make test WORKERS=0` runs them in this one.
WORKERS ?= 2
STAMP := .venv/installed

.PHONY: test test-slow lint types demo docs figures clean

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ". Give one: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# Files are compiled as they are imported: of the 14,000 that are installed, few ever are.
	@echo 'Installing into .venv; the first time this fetches PyTorch and takes some minutes.'
	$(BIN)/python -m pip install --quiet --no-compile -e '.[test]'
	touch $@

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -q -n $(WORKERS) --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q

lint: $(STAMP)
	$(BIN)/python -m ruff check .

types: $(STAMP)
	$(BIN)/python -m mypy

demo: $(STAMP)
	$(BIN)/python -m patrol_prune demo

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . docs/_build/html
	@echo 'Open docs/_build/html/index.html'

figures: $(STAMP)
	$(BIN)/python benchmarks/figures.py

clean:
	rm -rf .venv build dist docs/_build docs/api *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
