"""Every mistake gets one sentence that names the field, before a model is loaded."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tiny_run import SETTINGS, brightness

from ddpo_fast import DDPOConfig, checkpoint, cli
from ddpo_fast.pipeline import DefaultDDPOStableDiffusionPipeline

BAD_FIELDS = {
    "num_epochs": [-1, 1.5, "3"],
    "seed": [-1, None],
    "save_freq": [0, True],
    "num_checkpoint_limit": [0],
    "mixed_precision": ["fp8", "half", 16],
    "sample_num_steps": [0, 2.0],
    "sample_eta": [0, -1, 1.1, float("nan")],
    "sample_guidance_scale": [-1, float("inf"), float("nan"), "5"],
    "sample_batch_size": [0],
    "sample_num_batches_per_epoch": [0],
    "train_batch_size": [0],
    "train_micro_batch_size": [0, -3, 2.5],
    "train_learning_rate": [-1e-4, float("nan")],
    "train_adam_beta1": [1.0, -0.1],
    "train_adam_beta2": [1.0],
    "train_adam_weight_decay": [-1],
    "train_adam_epsilon": [0],
    "train_gradient_accumulation_steps": [0],
    "train_max_grad_norm": [0, -1],
    "train_num_inner_epochs": [0],
    "train_adv_clip_max": [0],
    "train_clip_range": [0, -1e-4],
    "train_timestep_fraction": [0, 1.1],
    "train_warmup_steps": [-1],
    "train_cfg": [1, "yes"],
    "per_prompt_stat_tracking_buffer_size": [0],
    "max_workers": [0],
    "log_with": ["tensorbord"],
    "logdir": [None],
    "project_kwargs": ["not json", "[1]", 3],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD_FIELDS.items() for v in values])
def test_each_field(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        DDPOConfig(**{name: value})
    assert "\n" not in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sample_batch_size": 2, "train_batch_size": 4}, "greater than or equal"),
        ({"sample_batch_size": 4, "train_batch_size": 3}, "divisible by the train batch size"),
        ({"sample_batch_size": 4, "train_batch_size": 4, "train_gradient_accumulation_steps": 3}, "samples per epoch"),
        ({"sample_num_steps": 10, "train_timestep_fraction": 0.05}, "train_timestep_fraction"),
        ({"zero": 2, "deepspeed": "ds.json"}, "leave out zero"),
        ({"offload": "optimizer", "deepspeed": "ds.json"}, "ask for offload_optimizer in the file"),
        ({"offload": "all", "zero": 2}, "needs zero=3"),
        ({"train_paged_adam": True}, "needs train_use_8bit_adam"),
        ({"train_paged_adam": True, "train_use_8bit_adam": True, "zero": 1}, "decide where states are"),
        ({"stochastic_rounding": True}, "needs mixed_precision='bf16'"),
        ({"optimizer_in_backward": True, "mixed_precision": "bf16"}, "set train_max_grad_norm=inf"),
        ({"optimizer_in_backward": True, "train_max_grad_norm": float("inf")}, "needs mixed_precision 'bf16' or 'no'"),
        ({"cuda_graphs": True, "zero": 1}, "cannot look through ZeRO"),
    ],
)
def test_rules_across_fields(settings, words):
    with pytest.raises(ValueError, match=words):
        DDPOConfig(**settings)


def test_a_field_changed_later_is_checked_too(make_trainer, monkeypatch):
    trainer = make_trainer()
    trainer.config.train_clip_range = -1
    with pytest.raises(ValueError, match="train_clip_range"):
        type(trainer)(trainer.config, brightness, lambda: ("a", {}), trainer.sd_pipeline)


def test_good_values_of_users_pass():
    import numpy as np

    DDPOConfig(mixed_precision=None, seed=np.int64(3), train_learning_rate=np.float32(1e-4), log_with="tensorboard")
    DDPOConfig(project_kwargs='{"project_dir": "x"}')


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test if a model is loaded."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr("ddpo_fast.pipeline.load_stable_diffusion", load)


REWARD_MODULE = """
import torch
def short(images, prompts, metadata): return torch.ones(1), {}
def bare(images, prompts, metadata): return torch.ones(len(images))
def nan(images, prompts, metadata): return torch.full((len(images),), float("nan")), {}
def broken(images, prompts, metadata): raise KeyError("missing")
def bad_prompt(): return "only a string"
number = 3
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--train_clip_range -1", "train_clip_range is -1.0"),
        ("--sample-batch-size 3 --train-batch-size 2", "divisible"),
        ("--reward jpeg", "reward is 'jpeg'"),
        ("--reward users_rewards:nothing", "has no function 'nothing'"),
        ("--reward users_rewards:number", "has no function 'number'"),
        ("--reward no_such_module:f", "no_such_module"),
        ("--reward users_rewards:short", "shape (1,) for 2 images"),
        ("--reward users_rewards:bare", "must return (rewards, metadata)"),
        ("--reward users_rewards:nan", "returned nan"),
        ("--reward users_rewards:broken", "KeyError: 'missing'"),
        ("--prompts nothing", "prompts is 'nothing'"),
        ("--prompts users_rewards:bad_prompt", "prompt function must return"),
        ("--pretrained_model ./nowhere", "no such folder"),
        ("--pretrained_model .", "model_index.json"),
        ("--resume_from nowhere", "does not exist"),
        ("--resume_from .", "holds no checkpoint"),
        ("--lora_rank 0", "lora_rank is 0"),
        ("--deepspeed nowhere.json", "deepspeed is 'nowhere.json', which cannot be read"),
        ("--zero 4", "zero is 4 but must be 0, 1, 2 or 3"),
        ("--output_dir taken", "already holds a run"),
        ("--output_dir users_rewards.py", "which is a file"),
    ],
)
def test_command_line(options, words, no_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "users_rewards", raising=False)
    (tmp_path / "users_rewards.py").write_text(REWARD_MODULE)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *options.split()])
    message = str(caught.value)
    assert words in message
    assert message.startswith("ddpo-fast train: error: ")
    assert "\n" not in message


def test_unknown_option_is_named(capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        cli.main(["train", "--num_epoch", "3"])
    assert "num_epoch" in str(caught.value) + capsys.readouterr().err


def test_broken_model_folder(tmp_path, model_dir):
    import shutil

    shutil.copytree(model_dir, tmp_path / "model")
    next((tmp_path / "model" / "unet").glob("*.safetensors")).write_bytes(b"not safetensors")
    with pytest.raises(OSError, match="could not be loaded") as caught:
        DefaultDDPOStableDiffusionPipeline(str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_checkpoint_of_another_run(make_trainer, tmp_path):
    make_trainer(use_lora=True, num_epochs=1).train()
    with pytest.raises(ValueError, match=r"LoRA adapter of .* this run trains a whole UNet"):
        make_trainer(resume_from=str(tmp_path / "run"), use_lora=False)


def test_unreadable_checkpoint(make_trainer, tmp_path):
    make_trainer(num_epochs=1).train()
    state = tmp_path / "run" / "checkpoints" / "checkpoint_1" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        make_trainer(resume_from=str(tmp_path / "run"))
    state.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        make_trainer(resume_from=str(tmp_path / "run"))


def test_a_second_run_does_not_overwrite_the_first(make_trainer):
    make_trainer(num_epochs=1).train()
    with pytest.raises(ValueError, match="already holds a run"):
        make_trainer(num_epochs=1)


@pytest.mark.parametrize("failure", ["raises", "nan", "short"])
def test_a_run_that_fails_midway_keeps_its_last_checkpoint(make_trainer, tmp_path, failure):
    calls = []

    def reward(images, prompts, metadata):
        calls.append(1)
        if len(calls) <= 2 * SETTINGS["sample_num_batches_per_epoch"]:
            return brightness(images, prompts, metadata)
        if failure == "raises":
            raise KeyError("gone")
        return (torch.full((len(images),), float("nan")) if failure == "nan" else torch.ones(1)), {}

    trainer = make_trainer(reward=reward, num_epochs=5)
    with pytest.raises((RuntimeError, ValueError), match="reward function"):
        trainer.train()
    assert checkpoint.find(tmp_path / "run").name == "checkpoint_2"


def test_a_loss_that_is_not_finite_stops_the_run(make_trainer, monkeypatch, tmp_path):
    trainer = make_trainer(num_epochs=1)
    monkeypatch.setattr(trainer, "loss", lambda advantages, clip_range, ratio: (ratio * float("nan")).mean())
    with pytest.raises(RuntimeError, match="train_learning_rate"):
        trainer.train()
    assert not checkpoint.numbered(tmp_path / "run" / "checkpoints")
