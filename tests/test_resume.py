"""A run that is killed at any moment and resumed ends with the bits of one that never was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from ddpo_fast import checkpoint

OPTIONS = (
    "--full-finetune --prompts animals --num_epochs 3 --sample_num_steps 3 --sample_batch_size 4 --train_batch_size 2 "
    "--train_num_inner_epochs 2 --train_learning_rate 1e-3 --per_prompt_stat_tracking "
    "--per_prompt_stat_tracking_min_count 2 --mixed_precision no"
).split()
TIMINGS = {"sample_s", "reward_s", "train_s", "images_per_s", "elapsed_s"}


def start(model: str, folder: Path, *more: str) -> subprocess.Popen:
    options = ["--output_dir", str(folder), "--pretrained_model", model, *OPTIONS, *more]
    return subprocess.Popen(
        [sys.executable, "-m", "ddpo_fast.train", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_when(process: subprocess.Popen, moment) -> None:
    deadline = time.monotonic() + 240
    while not moment():
        assert process.poll() is None, f"the run ended before the moment came:\n{process.stdout.read()[-2000:]}"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_run_ends_with_the_same_bits(model_dir, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(model_dir, whole)
    process = start(model_dir, killed)
    kill_when(process, lambda: (killed / "before.pt").exists())  # before any checkpoint
    assert not checkpoint.numbered(killed / "checkpoints")
    process = start(model_dir, killed, "--resume_from", str(killed))
    kill_when(process, lambda: (killed / "checkpoints" / ".checkpoint_1.partial").exists())  # while saving
    process = start(model_dir, killed, "--resume_from", str(killed))
    # after some updates of the second or third epoch, on top of a checkpoint
    kill_when(process, lambda: lines(killed) >= 12 and checkpoint.numbered(killed / "checkpoints"))
    # the settings come from the run itself
    final = subprocess.run(
        [sys.executable, "-m", "ddpo_fast.train", "--resume_from", str(killed)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert final.returncode == 0, final.stderr[-2000:]
    assert reference.wait() == 0
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
