"""What trackers are sent, read back from their files: TensorBoard's, and an offline run's of Weights & Biases."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from compare_runs import metrics_of
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import brightness

from ddpo_fast.config_rules import TRACKER_PACKAGES
from ddpo_fast.run_folder.trackers import image_trackers, log_array, log_images, tracker_config

SETTINGS = {"sample_num_steps": 2, "sample_freq": 1, "sample_num_images": 2, "eval_freq": 1, "eval_num_images": 2}
WATCHING = (Path(__file__).parents[1] / "docs" / "watching.md").read_text(encoding="utf-8")


def is_documented(name: str) -> bool:
    """Whether the table of docs/watching.md has the name of a scalar; NAME there stands for any reward."""
    parts = name.split("/")
    if len(parts) == 2:
        name = f"{parts[0]}/NAME_{parts[1].rpartition('_')[2]}"
    return f"`{name}`" in WATCHING.partition("## Trackers")[2]


def records_of_wandb(path):
    """The records of an offline run's file: 7 bytes, then blocks of 32 KiB as those of LevelDB's logs.

    A fragment in a block has 4 bytes of its checksum, 2 of its length, and one for whole, first, middle or last.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 2**15 - at % 2**15
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        # whole, or the last part
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


@pytest.fixture
def tracked(make_trainer, monkeypatch, tmp_path):
    def train(log_with, **options):
        # wandb writes a folder into the working directory
        monkeypatch.chdir(tmp_path)
        trainer = make_trainer(log_with=log_with, eval_reward=brightness, prompts="animals", **SETTINGS, **options)
        trainer.train()
        trainer.accelerator.end_training()
        return trainer

    return train


def test_tensorboard(tracked):
    trainer = tracked("tensorboard", tracker_project_name="mine")
    found = EventAccumulator(str(trainer.output_dir / "mine"), size_guidance={"images": 0}).Reload()
    scalars = {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}
    assert [name for name in scalars if not is_documented(name)] == []
    updates, epochs = metrics_of(trainer, "update"), metrics_of(trainer, "epoch")
    assert scalars["loss"] == pytest.approx({line["update"]: line["loss"] for line in updates}, rel=1e-5)
    assert list(scalars["reward_mean"].values()) == pytest.approx([line["reward_mean"] for line in epochs], rel=1e-5)
    assert len(scalars["eval/brightness_mean"]) == 3
    images = found.Images("samples")
    assert [image.step for image in images] == [0, 1, 3]
    assert images[0].width > images[0].height


def test_wandb_offline(tracked, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    # wandb puts functions of its own in their place
    monkeypatch.setattr(sys, "exit", sys.exit)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    trainer = tracked("wandb", tracker_kwargs={"wandb": {"mode": "offline"}}, tracker_project_name="mine")
    (file,) = Path("wandb").glob("offline-run-*/*.wandb")
    rows, steps, config = {}, {}, ""
    for record in records_of_wandb(file):
        items = [("/".join(item.nested_key) or item.key, json.loads(item.value_json)) for item in record.history.item]
        for name, value in items:
            rows.setdefault(name, []).append(value)
            steps.setdefault(name, []).append(dict(items)["_step"])
        config += "".join(item.value_json for item in record.config.update)
        if record.run.project:
            assert record.run.project == "mine"
    assert '"sample_freq":1' in config
    updates = metrics_of(trainer, "update")
    assert rows["loss"] == pytest.approx([line["loss"] for line in updates])
    assert steps["loss"] == [line["update"] for line in updates]
    numbers = {name for name, values in rows.items() if isinstance(values[0], (int, float))}
    ours = [name for name in sorted(numbers) if not name.startswith(("_", "samples/"))]
    assert [name for name in ours if not is_documented(name)] == []
    pictures = [Path(file.parent, "files", *names) for names in rows["samples/filenames"]]
    assert steps["samples/filenames"] == [0, 1, 3]
    shown = np.asarray(Image.open(pictures[0]).convert("RGB"))
    assert shown.shape[1] > shown.shape[0]
    assert shown.std() > 10


def test_accelerates_trackers_can_be_chosen_by_name_and_get_what_they_take():
    assert set(TRACKER_PACKAGES) == set(LOGGER_TYPE_TO_CLASS)
    # not started, so that none of their packages is needed
    trackers = {name: object.__new__(kind) for name, kind in LOGGER_TYPE_TO_CLASS.items()}
    sent = {}
    for name, tracker in trackers.items():
        tracker.log = lambda values, step, name=name: sent.setdefault(name, values)
        if hasattr(tracker, "log_images"):
            tracker.log_images = lambda images, step, name=name, **layout: sent.setdefault(
                name, images["samples"].shape
            )
    accelerator = SimpleNamespace(trackers=list(trackers.values()))
    takers = image_trackers(accelerator)
    assert {tracker.name for tracker in takers} == {"wandb", "tensorboard", "swanlab", "aim", "clearml"}
    for tracker in takers:
        log_images(tracker, {"samples": np.zeros((2, 3, 3), np.uint8)}, 0)
    one, batch = (2, 3, 3), (1, 2, 3, 3)
    assert sent == {"wandb": batch, "tensorboard": batch, "swanlab": batch, "aim": one, "clearml": one}
    sent.clear()
    log_array(accelerator, "reward", np.ones(2), 0)
    assert list(sent) == ["wandb"]
    config = {"seed": 1, "deepspeed": None}
    assert tracker_config("mlflow", config) == {"seed": 1}
    assert tracker_config("wandb", config) == tracker_config([], config) == {"ddpo_trainer_config": config}
