"""Broken model folders and checkpoints: one sentence names the file, and nothing on the disk changes."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from file_damage import cut, files_in, flip_a_bit
from one_sentence import ends_with_one_sentence, refused
from tiny_run import SETTINGS, forget_accelerate_state

from ddpo_fast import cli
from ddpo_fast.pipeline import DefaultDDPOStableDiffusionPipeline

OPTIONS = [f"--{name}={value}" for name, value in {**SETTINGS, "sample_num_steps": 2, "num_epochs": 1}.items()]
OPTIONS.append("--recipe=trl")
MORE = ["--num_epochs", "3"]

# damage


DAMAGE = {
    "empty": cut(0),
    "half": cut(0.5),
    "one byte short": cut(1, 1),
    "a bit": flip_a_bit,
    "missing": Path.unlink,
}


# model folders

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(("model_index.json", DAMAGE[name]) for name in ("empty", "half", "missing")),
        ("model_index.json", folder_instead),
        ("model_index.json", lambda path: path.write_text("[]")),
        *((WEIGHTS, DAMAGE[name]) for name in ("empty", "half", "one byte short", "missing")),
        *(("unet/config.json", DAMAGE[name]) for name in ("empty", "half", "missing")),
        *(("vae/config.json", DAMAGE[name]) for name in ("half", "missing")),
        ("vae/diffusion_pytorch_model.safetensors", DAMAGE["half"]),
        *(("scheduler/scheduler_config.json", DAMAGE[name]) for name in ("half", "missing")),
        ("text_encoder/config.json", DAMAGE["half"]),
        ("text_encoder/model.safetensors", DAMAGE["half"]),
        ("tokenizer", shutil.rmtree),
        ("unet", shutil.rmtree),
    ],
)
def test_a_broken_model_folder_is_refused_and_unchanged(model_dir, tmp_path, file, damage):
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    damage(model / file)
    before = files_in(model)
    with refused((ValueError, OSError), "", "pretrained_model", str(model)):
        DefaultDDPOStableDiffusionPipeline(str(model))
    assert files_in(model) == before


# checkpoints


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory) -> Path:
    """The folder of a run with two checkpoints."""
    run = tmp_path_factory.mktemp("finished") / "run"
    forget_accelerate_state()
    cli.main(["train", *OPTIONS, "--num_epochs=2", "--pretrained_model", model_dir, "--output_dir", str(run)])
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


FILES = ("state.json", "training.pt", "random_0.pt", "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_refused_and_names_the_one_before(run, capsys, file, damage):
    newest = run / "checkpoints" / "checkpoint_2"
    DAMAGE[damage](newest / file)
    before = files_in(run)
    ends_with_one_sentence(["train", "--resume_from", str(run), *MORE], capsys, "checkpoint_2", "checkpoint_1")
    assert files_in(run) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, "format": 99},
        lambda state: {name: state[name] for name in state if name != "config"},
        lambda state: {name: state[name] for name in state if name != "trained"},
        lambda state: [],
    ],
)
def test_a_state_file_of_another_kind_is_refused(run, capsys, change):
    path = run / "checkpoints" / "checkpoint_2" / "state.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    before = files_in(run)
    ends_with_one_sentence(["train", "--resume_from", str(run), *MORE], capsys, "checkpoint_2")
    assert files_in(run) == before


@pytest.mark.parametrize("file", ["before.pt", "metrics.jsonl"])
@pytest.mark.parametrize("damage", ["empty", "half", "missing"])
def test_a_damaged_file_that_only_pictures_need_does_not_stop_a_run(run, file, damage):
    DAMAGE[damage](run / file)
    cli.main(["train", "--resume_from", str(run), *MORE])
    assert (run / "checkpoints" / "checkpoint_3" / "state.json").exists()
    assert (run / "final").exists()


# folders that cannot be written


@pytest.mark.parametrize(
    "place", ["file/run", "/proc/run", "/dev/null/run", "/dev/full", "a" * 300, "/sys/kernel/run", "file"]
)
def test_an_output_folder_that_cannot_be_written_is_refused(place, tmp_path, monkeypatch, capsys):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr("ddpo_fast.pipeline.load_pipeline", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    ends_with_one_sentence(["train", *OPTIONS, "--output_dir", place], capsys, "output_dir", place[:40])
    assert files_in(tmp_path) == {"file": b"mine"}


def test_a_disk_that_fills_up(run, monkeypatch, capsys):
    """Earlier checkpoints stay complete, and no partial one is left beside them."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = files_in(run / "checkpoints")
    for module in (torch, safetensors.torch):
        monkeypatch.setattr(module, "save" if module is torch else "save_file", full)
    ends_with_one_sentence(["train", "--resume_from", str(run), *MORE], capsys, "No space left on device")
    assert files_in(run / "checkpoints") == kept
