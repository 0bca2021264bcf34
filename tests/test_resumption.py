"""A run that is killed at any moment and resumed ends with the bits of one that never was."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from run_process import finish
from safetensors.torch import load_file

from ddpo_fast.run_folder import checkpoint

OPTIONS = (
    "--full-finetune --prompts animals --num_epochs 3 --sample_num_steps 3 --sample_batch_size 4 --train_batch_size 2 "
    "--train_num_inner_epochs 2 --train_learning_rate 1e-3 --per_prompt_stat_tracking "
    "--per_prompt_stat_tracking_min_count 2 --mixed_precision no"
).split()
STEP = "ddpo_fast.engine.local.Engine.step"
TIMINGS = {"sample_s", "reward_s", "train_s", "images_per_s", "elapsed_s"}


def train(*arguments: str, killed_at: tuple[str, int] | None = None) -> None:
    """`ddpo-fast train` to its end, or killed at the so-many-th call of a function."""
    start = ["-m", "ddpo_fast.train"]
    if killed_at is not None:
        start = [str(Path(__file__).with_name("killed_run.py")), *map(str, killed_at)]
    done = finish([sys.executable, *start, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == (0 if killed_at is None else -signal.SIGKILL), done.stderr[-2000:]


def test_killed_run_ends_with_the_same_bits(model_dir, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--pretrained_model", model_dir, *OPTIONS]
    train("--output_dir", str(whole), *options)
    options += ["--output_dir", str(killed)]
    train(*options, killed_at=(STEP, 3))  # before any checkpoint
    assert (killed / "before.pt").exists()
    assert not checkpoint.list_in(killed / "checkpoints")
    train(*options, "--resume_from", str(killed), killed_at=("os.fsync", 2))  # while saving
    assert list((killed / "checkpoints").glob(".checkpoint_1.partial*"))
    assert not checkpoint.list_in(killed / "checkpoints")
    # in the third epoch's second update, on top of a checkpoint
    train(*options, "--resume_from", str(killed), killed_at=(STEP, 8 + 8 + 2))
    assert [path.name for path in checkpoint.list_in(killed / "checkpoints")] == ["checkpoint_1", "checkpoint_2"]
    # the settings come from the run itself
    train("--resume_from", str(killed))
    same_run(whole, killed)


def same_run(whole: Path, killed: Path) -> None:
    a, b = (checkpoint.find(folder) for folder in (whole, killed))
    assert a.name == b.name == "checkpoint_3"
    weights = [load_file(c / "unet" / "diffusion_pytorch_model.safetensors") for c in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    training = [checkpoint.read_training(c) for c in (a, b)]
    assert flat(training[0]) == flat(training[1])
    random_states = [checkpoint.read_random_state(c, 0) for c in (a, b)]
    assert flat(random_states[0]) == flat(random_states[1])
    records = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, killed)]
    assert len(records[0]) == 3 * (1 + 8)  # epochs x (one line each + updates)
    for one, other in zip(*records, strict=True):
        assert untimed(one) == untimed(other)
    assert (killed / "before_after.png").read_bytes() == (whole / "before_after.png").read_bytes()
    assert (killed / "final" / "model_index.json").exists()


def untimed(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in TIMINGS}


def flat(value) -> object:
    """Nested data with tensors, comparable to the bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [flat(item) for item in value]
    return value
