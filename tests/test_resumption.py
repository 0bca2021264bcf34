"""A run that is killed at any moment and resumed ends with the same bits as one that was never killed."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

import killed_run
from compare_runs import as_bytes, metrics_of, same_bits, without_timings
from safetensors.torch import load_file
from tiny_run import forget_accelerate_state

from ddpo_fast import cli
from ddpo_fast.run_folder import checkpoint

OPTIONS = (
    "--recipe trl --full-finetune --prompts animals --num_epochs 3 --sample_num_steps 3 --sample_batch_size 4 "
    "--train_batch_size 2 "
    "--train_num_inner_epochs 2 --train_learning_rate 1e-3 --train_image_credit value --per_prompt_stat_tracking "
    "--per_prompt_stat_tracking_min_count 2 --mixed_precision no"
).split()
# a clean process that has imported the package and is forked for each run
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ddpo_fast.cli"])
STEP = "ddpo_fast.engine.local.LocalEngine.step"


def train(*arguments: str, killed_at: tuple[str, int] | None = None) -> None:
    """Runs `ddpo-fast train` to its end, or in a process that is killed at (function, count), the function's call."""
    if killed_at is None:
        forget_accelerate_state()
        cli.main(["train", *arguments])
    else:
        process = FORKS.Process(target=killed_run.run, args=(*killed_at, *arguments))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL


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
    # in the second update of the third epoch, after a checkpoint was saved
    train(*options, "--resume_from", str(killed), killed_at=(STEP, 8 + 8 + 2))
    assert [path.name for path in checkpoint.list_in(killed / "checkpoints")] == ["checkpoint_1", "checkpoint_2"]
    # the settings are read from the run's folder
    train("--resume_from", str(killed))
    same_run(whole, killed)


def same_run(whole: Path, killed: Path) -> None:
    a, b = (checkpoint.find(folder) for folder in (whole, killed))
    assert a.name == b.name == "checkpoint_3"
    assert same_bits(*(load_file(c / "unet" / "diffusion_pytorch_model.safetensors") for c in (a, b)))
    training = [checkpoint.read_training(c) for c in (a, b)]
    assert as_bytes(training[0]) == as_bytes(training[1])
    random_states = [checkpoint.read_random_state(c, 0) for c in (a, b)]
    assert as_bytes(random_states[0]) == as_bytes(random_states[1])
    records = [metrics_of(folder) for folder in (whole, killed)]
    assert len(records[0]) == 3 * (1 + 8)  # 3 epochs, each with a line of its own and one for each of 8 updates
    for one, other in zip(*records, strict=True):
        assert without_timings(one) == without_timings(other)
    assert (killed / "before_after.png").read_bytes() == (whole / "before_after.png").read_bytes()
    assert (killed / "final" / "model_index.json").exists()
