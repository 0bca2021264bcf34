# `make demo` and `make test` set everything up by themselves: a virtual environment and the pinned packages.

PYTHON ?= python3
VENV ?= .venv
# What the project is tested with. Some of these versions need Python 3.11: with 3.10 give CONSTRAINTS=/dev/null, and pip
# chooses the newest that run there.
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# full: what README shows, in minutes; quick: the same steps in seconds, too few to learn anything
DEMO ?= full
DEMO_FOLDER := runs/demo-$(shell date +%Y%m%d-%H%M%S)
# idle OpenMP threads sleep instead of spinning, which costs a shared machine dearly
export OMP_WAIT_POLICY ?= PASSIVE
# DeepSpeed's own kernels are compiled where they are used, and not when it is installed
export DS_BUILD_OPS ?= 0

# Python compiles a module when it is first imported, which two thirds of the packages' modules never are. It has to keep
# the result, whatever the user's environment says: the tests start some hundred processes.
export PYTHONDONTWRITEBYTECODE :=
PIP_OPTIONS := --quiet --disable-pip-version-check --no-compile

.PHONY: setup demo test tests test-fast test-bench lint browser clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_OPTIONS) --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install $(PIP_OPTIONS) --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $(READY)

# All weights of the bundled model, towards smaller and then towards larger JPEG files, with the recipe that the command
# line chooses (ddpo_fast/recipes/bundled-full.yaml).
DEMO_OPTIONS := --full-finetune --prompts demo_animals --num_epochs 4 --save_freq 2

# argparse takes the last of two values
DEMO_full := $(DEMO_OPTIONS)
DEMO_quick := $(DEMO_OPTIONS) --num_epochs 2 --sample_num_steps 3 --sample_batch_size 4 --sample_num_batches_per_epoch 2

ifeq ($(filter full quick,$(DEMO)),)
$(error DEMO is '$(DEMO)' but must be full or quick)
endif

demo: $(READY)
	@for goal in compressibility incompressibility; do \
		$(BIN)/ddpo-fast train --reward jpeg_$$goal --output_dir $(DEMO_FOLDER)/$$goal $(DEMO_$(DEMO)) || exit 1; \
	done
	@echo "look at report.html in $(DEMO_FOLDER)/compressibility and $(DEMO_FOLDER)/incompressibility"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/emulated_cuda/*
	$(BIN)/typos

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Both at once: mypy takes half a minute of one core without its cache.
test: $(READY)
	$(MAKE) --jobs 2 lint tests

tests: $(READY)
	$(PYTEST) -m "not benchmark"

# A headless Chromium for tests/test_report_browser.py, which is skipped without one. A target of its own, as it installs
# packages of the system.
browser:
	@for name in chromium-headless-shell chromium chromium-browser google-chrome; do \
		command -v $$name && exit; \
	done; \
	apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends \
		chromium-headless-shell fonts-dejavu-core >/dev/null || \
		echo "no Chromium could be installed: tests/test_report_browser.py is skipped"

# whole tiny runs of the benchmarks' scripts, to be tested before a figure is recorded
test-bench: $(READY)
	$(PYTEST) -m benchmark

# The tests that are not marked slow (see tests/conftest.py), in less than two minutes. Lint is a target of its own, as
# mypy alone takes half a minute without its cache.
test-fast: $(READY)
	$(PYTEST) -m "not slow"

clean:
	rm -rf $(VENV) build *.egg-info
