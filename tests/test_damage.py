"""A damaged file of a run is named in one sentence with the checkpoint to use instead, or ignored if it may be."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from file_damage import cut, flip_a_bit
from one_sentence import refused
from safetensors import SafetensorError
from tiny_run import Prompts, brightness, build_trainer, forget_accelerate_state

from ddpo_fast import DefaultDDPOStableDiffusionPipeline
from ddpo_fast.run_folder import checkpoint
from ddpo_fast.run_folder.metrics_file import MetricsFile


@pytest.fixture(scope="module")
def whole(model_dir, tmp_path_factory):
    """The folder of a run of two epochs, which no test changes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    build_trainer(model_dir, folder, use_lora=True, sample_num_steps=2).train()
    forget_accelerate_state()
    return folder


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


FILES = ["state.json", "training.pt", "random_0.pt", "pytorch_lora_weights.safetensors"]


@pytest.mark.parametrize("damage", [cut(0.5), flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_names_the_file_and_the_one_before_it(run, damage, name):
    checkpoint.verify(checkpoint.find(run))
    damage(run / "checkpoints" / "checkpoint_2" / name)
    with refused(ValueError, name.replace(".", r"\.") if damage is not Path.unlink else "checkpoint_2") as found:
        checkpoint.verify(checkpoint.find(run))
    assert str(found.value).endswith(f"--resume_from {run / 'checkpoints' / 'checkpoint_1'}")
    # a checkpoint that is damaged as well is not recommended
    damage(run / "checkpoints" / "checkpoint_1" / name)
    with pytest.raises(ValueError, match="checkpoint_2") as found:
        checkpoint.verify(checkpoint.find(run))
    assert "checkpoint_1" not in str(found.value)


def without_digests(folder):
    state = json.loads((folder / "state.json").read_text())
    del state["files"], state["sha256"]
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("name", ["training.pt", "random_0.pt"])
@pytest.mark.parametrize("damage", [cut(0.5), Path.unlink])
def test_a_checkpoint_without_digests(run, damage, name):
    newest = run / "checkpoints" / "checkpoint_2"
    without_digests(newest)
    checkpoint.verify(newest)
    damage(newest / name)
    with refused(ValueError, rf"{name}.*checkpoint_1$"):
        checkpoint.verify(newest)


@pytest.mark.parametrize("missing", ["config", "trained", "epochs"])
def test_a_state_without_a_required_entry_is_refused(run, missing):
    path = run / "checkpoints" / "checkpoint_2" / "state.json"
    state = json.loads(path.read_text())
    del state[missing], state["sha256"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=f"does not say '{missing}'"):
        checkpoint.read_state(path.parent)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", "3"), ("epochs", -1), ("epochs", 1.5), ("epochs", True), ("global_step", None)),
        *(("elapsed_s", "a"), ("metrics_bytes", -5), ("trained", 5), ("trained", {}), ("measured", [1])),
        *(("files", ["a"]), ("files", {"a": 1}), ("import_folders", "x"), ("pretrained_model", 5)),
        *(("lora_rank", "x"), ("lora_target_modules", 5), ("lora_target_modules", [1]), ("use_lora", "yes")),
    ],
)
def test_a_state_with_values_of_wrong_types_is_refused(run, name, value):
    path = run / "checkpoints" / "checkpoint_2" / "state.json"
    state = json.loads(path.read_text())
    trained = state["trained"]
    del state["sha256"]
    path.write_text(json.dumps({**state, name: value}))
    with refused(ValueError, r"checkpoint_2.* is damaged"):
        checkpoint.check_trained_weights_match(path.parent, checkpoint.read_state(path.parent)["trained"], trained)


def test_the_trainer_refuses_a_damaged_checkpoint_and_takes_the_one_before_it(run, make_trainer):
    flip_a_bit(run / "checkpoints" / "checkpoint_2" / "training.pt")
    options = {"use_lora": True, "output_dir": str(run), "sample_num_steps": 2}
    with pytest.raises(ValueError, match=r"training\.pt is not as it was written"):
        make_trainer(resume_from=str(run), **options)
    trainer = make_trainer(resume_from=str(run / "checkpoints" / "checkpoint_1"), **options)
    assert trainer.first_epoch == 1


@pytest.mark.parametrize(
    ("content", "epochs"),
    [
        (b"", []),
        (b'{"kind": "epoch", "epoch": 0}\n{"kind": "ep', [0]),
        (b"\0" * 20 + b'\n{"kind": "epoch", "epoch": 1}\n', [1]),
        (b'{"kind": "epoch", "epoch": 0}\n' + b"\0" * 40, [0]),
        (b'\xff\xfe\n3\n[]\n{"kind": "epoch", "epoch": 0}\n', [0]),
    ],
)
def test_metrics_lose_only_the_lines_that_are_damaged(tmp_path, content, epochs):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.path.write_bytes(content)
    assert [record["epoch"] for record in metrics.read()] == epochs
    # a resumed run does so if its checkpoint was saved when the file was longer
    metrics.truncate(1000)
    metrics.append({"kind": "epoch", "epoch": 7})
    assert [record["epoch"] for record in metrics.read()] == [*epochs, 7]
    assert metrics.size() <= len(content) + 40


def test_metrics_after_the_checkpoint_are_written_again(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.truncate(10)
    metrics.append({"kind": "epoch", "epoch": 0})
    size = metrics.size()
    metrics.append({"kind": "epoch", "epoch": 1})
    metrics.truncate(size)
    assert [record["epoch"] for record in metrics.read()] == [0]


def numpy_prompt():
    return np.random.choice(np.array(["a cat", "a dog"])), {}


class NumpyReward:
    def __init__(self):
        self.best, self.rng = np.float64(0), np.random.RandomState(0)

    def __call__(self, images, prompts, metadata):
        rewards, info = brightness(images, prompts, metadata)
        self.best = max(self.best, np.float64(rewards.max()))
        self.rng.rand()
        return rewards, info

    def state_dict(self):
        return {"best": self.best, "rng": self.rng.get_state()}

    def load_state_dict(self, state):
        self.best = state["best"]
        self.rng.set_state(state["rng"])


def test_a_run_with_numpys_types_is_resumed(make_trainer, tmp_path):
    settings = {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 2, "sample_num_steps": 2}
    first = make_trainer(reward=NumpyReward(), prompts=numpy_prompt, num_epochs=1, **settings)
    first.train()
    resumed = make_trainer(reward=NumpyReward(), prompts=numpy_prompt, resume_from=str(tmp_path / "run"), **settings)
    assert resumed.first_epoch == 1
    assert resumed.reward_fn.best == first.reward_fn.best > 0
    assert resumed.reward_fn.rng.rand() == first.reward_fn.rng.rand()
    assert resumed.stat_tracker.get_stats() == first.stat_tracker.get_stats()


def test_what_cannot_be_saved_is_found_before_training(make_trainer):
    class Unsavable(NumpyReward):
        def __call__(self, *_):
            raise AssertionError("it was asked for a reward")

        def state_dict(self):
            return {"scorer": lambda: 0}

    with pytest.raises(ValueError, match=r"reward_function.state_dict\(\)\['scorer'\] is of type builtins.function"):
        make_trainer(reward=Unsavable()).train()


def test_a_function_whose_state_raises(make_trainer):
    prompts = Prompts()
    prompts.state_dict, prompts.load_state_dict = lambda: 1 / 0, lambda state: state["seen"]
    said = r"^prompt_function\.%s\(\) raised %s \(line \d+ of test_damage.py\)$"
    with pytest.raises(ValueError, match=said % ("state_dict", "ZeroDivisionError: division by zero")):
        make_trainer(prompts=prompts).train()
    with pytest.raises(ValueError, match=said % ("load_state_dict", "KeyError: 'seen'")):
        checkpoint.load_function_states({"prompt_function": prompts}, {"prompt_function": {}})


def test_an_adapted_convolution_can_be_saved(make_trainer, model_dir, tmp_path):
    pipeline = DefaultDDPOStableDiffusionPipeline(model_dir, lora_target_modules=["conv1", "to_q"])
    for parameter in pipeline.get_trainable_layers().parameters():
        if parameter.requires_grad and parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    make_trainer(pipeline=pipeline, num_epochs=1, sample_num_steps=2).train()
    assert checkpoint.find(tmp_path / "run").name == "checkpoint_1"


def test_a_full_disk_gives_one_sentence_and_earlier_checkpoints_stay(make_trainer, tmp_path):
    trainer = make_trainer(num_epochs=1, sample_num_steps=2)
    trainer.train()
    folder = tmp_path / "run" / "checkpoints"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The weights take 1 MB and the optimizer's states twice that: the first limit stops writing the weights, the
    # second one the states. A call after a failed one first trains what that one left, which is nothing but the save.
    for epochs, limit in ((1, 100_000), (2, 1_500_000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with refused(OSError, r"no checkpoint could be written to .*checkpoints"):
                trainer.train(epochs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert sorted(p.name for p in folder.iterdir()) == ["checkpoint_1"]
        checkpoint.verify(folder / "checkpoint_1")


def test_a_disk_that_is_full_at_the_end_gives_one_sentence(make_trainer, monkeypatch):
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    trainer = make_trainer()
    monkeypatch.setattr(trainer.sd_pipeline, "save_pretrained", Mock(side_effect=full))
    with pytest.raises(OSError, match=r"final: No space left on device; .* --resume_from .*run to write it"):
        trainer.save_model()


def test_files_have_the_modes_of_the_users_umask(make_trainer, tmp_path):
    umask = os.umask(0o027)
    try:
        trainer = make_trainer(use_lora=True, num_epochs=1, sample_num_steps=2)
        trainer.train()
        trainer.save_model()
    finally:
        os.umask(umask)
    written = [path for part in ("checkpoints", "final") for path in (tmp_path / "run" / part).rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written if path.is_file()} == {0o640}


def test_an_error_while_drawing_does_not_stop_a_run(make_trainer, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("ddpo_fast.run_folder.pictures.draw_rewards", fail)
    make_trainer(num_epochs=1, sample_num_steps=2, draws=True).train()
    assert "could not be drawn (RuntimeError: no fonts)" in caplog.text
