# make demo   the main job on a small checkpoint: convert, verify, generate
# make test   the tests
# make lint   ruff and mypy

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 10), 'Python 3.10 or newer is needed'"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/attnres demo

test: .venv/installed
	$(BIN)/python tests/fetch_transformers_tests.py
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .cache/typecheck && ln -sfn ../.. .cache/typecheck/attnres
	MYPYPATH=.cache/typecheck $(BIN)/mypy

clean:
	rm -rf .venv .cache demo-output build *.egg-info
