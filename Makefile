# `make demo` and `make test` set everything up by themselves: a virtual environment and the pinned packages.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# full: what README shows, in minutes; quick: the same steps in seconds, for nothing but to see them
DEMO ?= full
DEMO_FOLDER := runs/demo-$(shell date +%Y%m%d-%H%M%S)
# idle OpenMP threads sleep instead of spinning, which costs a shared machine dearly
export OMP_WAIT_POLICY ?= PASSIVE
# DeepSpeed's own kernels are compiled where they are used, and not when it is installed
export DS_BUILD_OPS ?= 0

.PHONY: setup demo test test-fast test-bench lint clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

# All weights of the bundled model, towards smaller and then towards larger JPEG files. The clip range grows as
# latents shrink: a log-prob is a mean over 1,024 elements here and over 16,384 for Stable Diffusion.
DEMO_OPTIONS := --full-finetune --prompts demo_animals --num_epochs 12 --save_freq 4 \
	--sample_num_steps 20 --sample_guidance_scale 3 --sample_batch_size 16 --sample_num_batches_per_epoch 2 \
	--train_batch_size 16 --train_micro_batch_size 40 --train_timestep_fraction 0.5 --train_learning_rate 4e-4 \
	--train_adam_beta2 0.99 --train_warmup_steps 10 --train_clip_range 5e-3 --per_prompt_stat_tracking \
	--per_prompt_stat_tracking_buffer_size 32 --per_prompt_stat_tracking_min_count 2

# the last of two values counts
DEMO_full := $(DEMO_OPTIONS)
DEMO_quick := $(DEMO_OPTIONS) --num_epochs 2 --sample_num_steps 3 --sample_batch_size 4 --train_batch_size 4

ifeq ($(filter full quick,$(DEMO)),)
$(error DEMO is '$(DEMO)' but must be full or quick)
endif

demo: $(READY)
	@for goal in compressibility incompressibility; do \
		$(BIN)/ddpo-fast train --reward jpeg_$$goal --output_dir $(DEMO_FOLDER)/$$goal $(DEMO_$(DEMO)) || exit 1; \
	done
	@echo "look at before_after.png and rewards.png in $(DEMO_FOLDER)/compressibility and $(DEMO_FOLDER)/incompressibility"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/typos

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not benchmark"

# the rest of the benchmarks' own tests, whole tiny runs of each script: before a figure is recorded
test-bench: $(READY)
	$(PYTEST) -m benchmark

# What is not marked slow (see tests/conftest.py), in less than two minutes, most of them on the trainer and the kernels.
# Without lint, of which mypy alone takes half a minute where it has not run before: `make lint`.
test-fast: $(READY)
	$(PYTEST) -m "not slow"

clean:
	rm -rf $(VENV) build *.egg-info
