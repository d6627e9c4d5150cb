# The two main targets are `make train`, which trains phi on real text, and `make test`. Each sets up .venv as needed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SETUP := pyproject.toml setup.py constraints.txt
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')
ARGS ?=

.PHONY: help train test test-slow test-kernels prove lint format docs wheel bench gpu gpu-kit sanitize mutants attack clean

help:
	@echo 'make train      train the recipe `tiny` on real text (options: make train ARGS="--recipe ... --tokens ...")'
	@echo 'make test       run the tests'
	@echo 'make test-slow  run the tests marked slow'
	@echo 'make test-kernels  test the kernels with another torch and Triton (TORCH="2.8.*" TRITON="3.4.*" PYTHON=python3.12)'
	@echo 'make prove      execute the kernels as Triton compiled them: bounds, races, unwritten memory (Python 3.12 or 3.13, no GPU)'
	@echo 'make lint       check with ruff, mypy and clang-format'
	@echo 'make format     format with ruff and clang-format'
	@echo 'make docs       build the documentation site in build/site; warnings are errors'
	@echo 'make wheel      build wheel and sdist in build/dist'
	@echo 'make bench      run the benchmarks, each with its peers'
	@echo 'make gpu        test and measure everything on the GPU within BUDGET=600 seconds (DRY=1: a trial on a CPU)'
	@echo 'make gpu-kit    collect what make gpu needs on a machine without network, in build/gpu-kit'
	@echo 'make sanitize   run the C++ under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make mutants    seed faults into the Triton kernels, one at a time, and list those that no test finds (ARGS="--only rotary")'
	@echo 'make attack     test with random kills, damaged files, hostile programs and op calls for an hour (ARGS="--minutes ... --seed ...")'

train: $(VENV)/.run
	$(BIN)/python -m phi_fast.train $(ARGS)

# One thread per process, since more threads than cores would slow the tests down. Three processes on two cores: many tests
# wait for processes that they started, or for a time limit.
test test-slow: export OMP_NUM_THREADS = 1

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 3 -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m slow $(ARGS)

# Runs the kernels' tests in a separate environment with another Python, torch and Triton; other packages have the
# versions of constraints.txt. Triton before 3.9 interprets loops wrongly with numpy 2.4 and later, which those exclude.
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

# Triton's kernels as compiled, executed on the CPU by ttsem, in an environment of its own. pyenv's commands fail for
# versions that are not selected: its folder is looked through too.
PROVE := .venv-prove
PROVE_PYTHON ?= $(shell for python in python3.12 python3.13 $(wildcard $(HOME)/.pyenv/versions/3.1[23].*/bin/python); do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2> /dev/null && echo $$python && break; done)

prove: export OMP_NUM_THREADS = 1
prove: export TRITON_INTERPRET = 0
prove: export PYTHONPATH = tests
prove: $(PROVE)/.installed
	$(PROVE)/bin/python -m pytest -n 2 -m "not slow" -p prove.plugin -k "triton and not (test_backend or test_codegen or far_rows or guard_pages)" \
		tests/kernels tests/prove/broken_kernels.py $(ARGS)

$(PROVE)/.installed: tests/prove/requirements.txt pyproject.toml setup.py $(SOURCES)
	@$(or $(PROVE_PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
		echo "make prove needs Python 3.12 or 3.13, which ttsem runs on. Install one, or say where it is:" \
			"make prove PROVE_PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PROVE_PYTHON) -m venv $(PROVE)
	$(PROVE)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/prove/requirements.txt
	$(PROVE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

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

# On a machine without .venv a kit is used where there is one, with the Python that has torch; nothing is installed.
BUDGET ?= 600
GPU_OPTIONS = --budget $(BUDGET) $(if $(DRY),--dry) $(ARGS)

ifeq ($(wildcard $(BIN)/python)$(wildcard build/gpu-kit/kit.json),build/gpu-kit/kit.json)
gpu: PYTHON = $(shell command -v python3)
gpu:
	$(PYTHON) benchmarks/gpu/start.py --kit $(GPU_OPTIONS)
else
gpu: $(if $(DRY),$(VENV)/.dev,$(VENV)/.bench)
	$(BIN)/python benchmarks/gpu/start.py $(GPU_OPTIONS)
endif

KIT_PYTHON ?= python3.12
gpu-kit:
	$(KIT_PYTHON) benchmarks/gpu/kit.py $(ARGS)

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

# litgpt is installed without its dependencies, because its pins exclude this project's versions of shared packages.
$(VENV)/.bench: $(VENV)/.dev
	$(PIP) --editable '.[bench]'
	$(PIP) --no-deps litgpt
	@touch $@ $(VENV)/.dev $(VENV)/.run
