# `make demo` and `make test` set everything up by themselves: a virtual environment and the pinned packages.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S)
# idle OpenMP threads sleep instead of spinning, which costs a shared machine dearly
export OMP_WAIT_POLICY ?= PASSIVE
# DeepSpeed's own kernels are compiled where they are used, and not when it is installed
export DS_BUILD_OPS ?= 0

.PHONY: setup demo test lint clean

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

demo: $(READY)
	@for goal in compressibility incompressibility; do \
		$(BIN)/ddpo-fast train --reward jpeg_$$goal --output_dir $(DEMO)/$$goal $(DEMO_OPTIONS) || exit 1; \
	done
	@echo "look at before_after.png and rewards.png in $(DEMO)/compressibility and $(DEMO)/incompressibility"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

clean:
	rm -rf $(VENV) build *.egg-info
