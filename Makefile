# `make demo` and `make test` set everything up by themselves: a virtual environment and the pinned packages.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?= runs/demo
# idle OpenMP threads sleep instead of spinning, which costs a shared machine dearly
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test lint clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

# All weights of the bundled model, towards smaller and towards larger JPEG files.
demo: $(READY)
	rm -rf $(DEMO)
	$(BIN)/python ddpo_fast/train.py --full-finetune --reward jpeg_compressibility --output_dir $(DEMO)/compressibility $$(cat demo.args)
	$(BIN)/python ddpo_fast/train.py --full-finetune --reward jpeg_incompressibility --output_dir $(DEMO)/incompressibility $$(cat demo.args)
	@echo "look at $(DEMO)/*/before_after.png and $(DEMO)/*/rewards.png"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest

clean:
	rm -rf $(VENV) build *.egg-info
