# Two commands: `make train` trains phi on real text, `make test` runs the tests. Each sets up what it needs in .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SETUP := pyproject.toml setup.py constraints.txt
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')
ARGS ?=

.PHONY: help train test test-slow test-kernels lint format docs wheel bench sanitize mutants attack clean

help:
	@echo 'make train      train the recipe `tiny` on real text (options: make train ARGS="--recipe ... --steps ...")'
	@echo 'make test       run the tests'
	@echo 'make test-slow  run the tests marked slow'
	@echo 'make test-kernels  the kernels with another torch and Triton (TORCH="2.8.*" TRITON="3.4.*" PYTHON=python3.12)'
	@echo 'make lint       ruff, mypy, clang-format'
	@echo 'make format     ruff and clang-format, in place'
	@echo 'make docs       the documentation as a site, in build/site; warnings are errors'
	@echo 'make wheel      wheel and sdist, in build/dist'
	@echo 'make bench      the benchmarks, each beside its peers'
	@echo 'make sanitize   the C++ under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make mutants    faults seeded into the Triton kernels, one at a time: which of them the tests see (ARGS="--only rotary")'
	@echo 'make attack     kills, flipped bits, damaged headers, hostile programs and op calls, for an hour (ARGS="--minutes ... --seed ...")'

train: $(VENV)/.run
	$(BIN)/python -m phi_fast.train $(ARGS)

# One thread per process: the tests run two at a time, and threads that wait for each other would slow both down.
test test-slow: export OMP_NUM_THREADS = 1

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m slow $(ARGS)

# The kernels' tests with another Python, torch and Triton, in an environment of its own; all else is in .venv's versions.
# Triton before 3.9 interprets loops wrongly with numpy 2.4 and later, which those versions exclude.
TORCH ?= 2.8.*
TRITON ?= 3.4.*
OTHER = build/kernels-python-$(shell $(PYTHON) -c 'import platform; print(platform.python_version())')-torch-$(subst *,x,$(TORCH))-triton-$(subst *,x,$(TRITON))

test-kernels: export OMP_NUM_THREADS = 1
test-kernels:
	$(PYTHON) -m venv $(OTHER)
	grep -vE '^(torch|triton|setuptools)==' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OTHER)/constraints.txt \
		'torch==$(TORCH)' 'triton==$(TRITON)' pytest pytest-xdist hypothesis rich tyro transformers accelerate peft --editable .
	$(OTHER)/bin/python -m pytest -n 2 -m "not slow" tests/kernels $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

wheel: $(VENV)/.dev
	$(BIN)/python -m build --no-isolation --outdir build/dist

bench: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks --benchmark $(ARGS)

sanitize: $(VENV)/.dev
	$(BIN)/python tests/sanitize.py
	PYTHON=$(BIN)/python sh csrc/cpu/sanitize.sh

mutants: export PYTHONPATH = tests
mutants: $(VENV)/.dev
	$(BIN)/python -m mutants $(ARGS)

attack: export PYTHONPATH = tests
attack: $(VENV)/.dev
	$(BIN)/python -m attack $(ARGS)

clean:
	rm -rf build *.egg-info phi_fast/_C*.so .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python $(SETUP) $(SOURCES)
	$(PIP) --editable '.[train]'
	@touch $@

$(VENV)/.dev: $(BIN)/python $(SETUP) $(SOURCES)
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.run

# litgpt's own pins exclude this project's versions of what both use.
$(VENV)/.bench: $(VENV)/.dev
	$(PIP) --editable '.[bench]'
	$(PIP) --no-deps litgpt
	@touch $@ $(VENV)/.dev $(VENV)/.run
