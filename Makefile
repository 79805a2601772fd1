# make demo   the main job on a small checkpoint: convert, verify, generate, evaluate
# make test   the tests
# make lint   ruff and mypy
# make test-versions   the core of the tests on older versions of Transformers

# The first of these that is new enough.
PYTHONS := python3 python3.13 python3.12 python3.11
PYTHON ?= $(firstword $(foreach p,$(PYTHONS),$(shell $(p) -c "import sys; sys.version_info < (3, 11) or print('$(p)')" 2>&-)))
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-versions lint clean

.venv/installed: pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error Python 3.11 or newer is needed, as transformers 5 does; name one: make PYTHON=...))
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/attnres demo

test: .venv/installed
	$(BIN)/python tests/fetch_transformers_tests.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-versions: .venv/installed
	rm -rf .cache/converted && mkdir -p .cache
	$(BIN)/attnres convert examples/tiny-qwen3 .cache/converted --num-blocks 4
	$(BIN)/nox --noxfile tests/noxfile.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .cache/typecheck && ln -sfn ../.. .cache/typecheck/attnres
	MYPYPATH=.cache/typecheck $(BIN)/mypy

clean:
	rm -rf .venv .cache demo-output build *.egg-info
