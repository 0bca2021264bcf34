"""Images of fixed prompts and noise in the course of a run, and its best and worst ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from compare_runs import as_bytes, metrics_of, trained_weights, without_timings
from one_sentence import refused
from PIL import Image
from tiny_run import Prompts, brightness

from ddpo_fast.random_state import random_state
from ddpo_fast.rewards import SeveralRewards
from ddpo_fast.run_folder import checkpoint, sample_files

SETTINGS = {"sample_num_steps": 2, "num_epochs": 3, "sample_freq": 2, "sample_num_images": 6}
# whose prompts are drawn by Python's generator, whose state a checkpoint keeps
RESUMED = SETTINGS | {"prompts": "animals"}


class Counting:
    """A reward with a state of its own, which also draws and seeds: training must notice none of it."""

    def __init__(self):
        self.calls = 0

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        torch.manual_seed(len(prompts))
        np.random.rand()
        return images.mean((1, 2, 3)) + 0.01 * self.calls, {}

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def listed(folder, name="samples.json"):
    return json.loads((folder / name).read_text())


def drawn_epochs(trainer):
    return sorted(path.name for path in (trainer.output_dir / "samples").iterdir())


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_run_with_images_has_the_bits_of_one_without(make_trainer, tmp_path):
    runs = []
    for freq in (0, 1):
        trainer = make_trainer(output_dir=tmp_path / str(freq), reward=Counting(), **SETTINGS | {"sample_freq": freq})
        trainer.train()
        last = trainer.progress.checkpoints / "checkpoint_3"
        state = [checkpoint.read_training(last), checkpoint.read_random_state(last, 0), trained_weights(trainer)]
        lines = [without_timings(line) for line in metrics_of(trainer)]
        runs.append((as_bytes(state), lines, str(random_state()), trainer.reward_fn.calls))
    assert not (tmp_path / "0" / "samples").exists()
    assert drawn_epochs(trainer) == [f"epoch_{n:05d}" for n in range(4)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("use_lora", [False, True])
def test_what_is_kept(make_trainer, use_lora):
    parts = SeveralRewards(
        {"bright": brightness, "red": lambda i, p, m: (i[:, 0].mean((1, 2)), {})}, {"bright": 1, "red": 2}
    )
    trainer = make_trainer(reward=parts, use_lora=use_lora, ema_decay=0.5, ema_sampling=True, **SETTINGS)
    trainer.train()
    samples = trainer.output_dir / "samples"
    # before the first update, every second epoch, and at the end
    assert drawn_epochs(trainer) == ["epoch_00000", "epoch_00002", "epoch_00003"]
    first = listed(samples / "epoch_00000")
    assert first["epoch"] == 0
    assert [entry["file"] for entry in first["samples"]] == [f"{i:03d}.jpg" for i in range(6)]
    assert {entry["prompt"] for entry in first["samples"]} == {"a cat", "a dog", "a horse", "a bee"}
    for entry in first["samples"]:
        image = pixels(samples / "epoch_00000" / entry["file"])
        assert image.shape == (16, 16, 3)
        assert entry["rewards"]["bright"] == pytest.approx(image.mean() / 255, abs=0.01)
        assert entry["reward"] == pytest.approx(entry["rewards"]["bright"] + 2 * entry["rewards"]["red"], rel=1e-5)
    # the images are those of the weights that the run samples with, the averages
    with trainer.policy.sampling():
        images, _ = trainer.policy.draw([first["samples"][1]["prompt"]], [1])
    bright = listed(samples / "epoch_00003")["samples"][1]["rewards"]["bright"]
    assert images.mean().item() == pytest.approx(bright, rel=1e-6)
    assert first["samples"][1]["rewards"]["bright"] != pytest.approx(bright, rel=1e-6)
    assert not (samples / "epoch_00000" / "extremes.json").exists()
    extremes = listed(samples / "epoch_00002", "extremes.json")
    assert [entry["file"] for entry in extremes["samples"]] == [
        f"{k}_{i}.jpg" for k in ("best", "worst") for i in range(4)
    ]
    found = [entry["reward"] for entry in extremes["samples"]]
    assert found[:4] == sorted(found[:4], reverse=True)
    assert found[4:] == sorted(found[4:])
    assert found[3] >= found[7]
    assert all((samples / "epoch_00002" / entry["file"]).exists() for entry in extremes["samples"])


def test_a_resumed_run_goes_on_with_the_same_prompts_and_noise(make_trainer, tmp_path):
    whole = make_trainer(output_dir=tmp_path / "whole", **RESUMED)
    whole.train()
    make_trainer(output_dir=tmp_path / "again", **RESUMED | {"num_epochs": 2}).train()
    old = sample_files.folder_of(tmp_path / "again", 3)
    old.mkdir()
    (old / "009.jpg").touch()
    again = make_trainer(output_dir=tmp_path / "again", resume_from=str(tmp_path / "again"), **RESUMED)
    again.train()
    assert drawn_epochs(again) == drawn_epochs(whole)
    for name in ("epoch_00000", "epoch_00002", "epoch_00003"):
        mine, theirs = (sorted((t.output_dir / "samples" / name).iterdir()) for t in (again, whole))
        assert [path.name for path in mine] == [path.name for path in theirs]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(mine, theirs, strict=True))
    # nothing is left to train, so nothing is drawn
    written = (again.output_dir / "samples" / "epoch_00003" / "samples.json").stat().st_mtime_ns
    make_trainer(output_dir=tmp_path / "again", resume_from=str(tmp_path / "again"), **RESUMED).train()
    assert (again.output_dir / "samples" / "epoch_00003" / "samples.json").stat().st_mtime_ns == written


def test_noise_does_not_depend_on_the_size_of_batches(make_trainer, tmp_path):
    images = []
    for size in (1, 4):
        batches = {"sample_batch_size": size, "train_batch_size": 1, "sample_num_batches_per_epoch": 4}
        trainer = make_trainer(output_dir=tmp_path / str(size), **batches, **SETTINGS)
        images.append(trainer.samples.draw().images)
    torch.testing.assert_close(*images, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux_dev"])
def test_every_family(tiny_model, make_trainer, name):
    settings = {"num_epochs": 0, "sample_freq": 1, "sample_num_images": 2, "sample_num_steps": 2}
    trainer = make_trainer(model=tiny_model(name), sample_prompts="demo_animals", **settings)
    trainer.train()
    assert drawn_epochs(trainer) == ["epoch_00000"]
    assert len(listed(trainer.output_dir / "samples" / "epoch_00000")["samples"]) == 2


def test_errors_and_full_disks(make_trainer, tmp_path, monkeypatch):
    calls = []

    def fails_later(images, prompts, metadata):
        calls.append(len(prompts))
        # two batches of images before the first epoch, two of the epoch itself
        if len(calls) == 5:
            raise OSError("no answer")
        return brightness(images, prompts, metadata)

    trainer = make_trainer(reward=fails_later, prompts=Prompts(), **SETTINGS | {"sample_freq": 1})
    with pytest.raises(RuntimeError, match="raised OSError: no answer"):
        trainer.train()
    trainer.train()
    assert drawn_epochs(trainer) == [f"epoch_{n:05d}" for n in range(4)]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_files, "write", full)
    trainer = make_trainer(output_dir=tmp_path / "full", **SETTINGS | {"num_epochs": 1})
    trainer.train()
    assert trainer.first_epoch == 1
    with refused(ValueError, "sample_num_images is 0 but must be a whole number from 1"):
        make_trainer(output_dir=tmp_path / "none", sample_num_images=0)
    with refused(ValueError, "sample_prompt_function is 3 .* but must be a function"):
        make_trainer(output_dir=tmp_path / "none", sample_prompts=3)
