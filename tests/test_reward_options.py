"""The rewards' settings on the command line: how they are read, recorded, trusted and used again."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
import torch
from compare_runs import metrics_of
from one_sentence import error_of_command, refused
from test_cli import OPTIONS, write_state

from ddpo_fast import DDPOConfig, cli
from ddpo_fast.commands import train as train_command
from ddpo_fast.commands.early_checks import device_of, try_reward
from ddpo_fast.commands.reward_options import RewardArguments, by_reward
from ddpo_fast.rewards import SeveralRewards
from ddpo_fast.run_folder import pictures

CODE = """
class Above:
    def __init__(self, limit=0.5, model="", url=""): self.limit = limit
    def __call__(self, images, prompts, metadata): return (images > self.limit).float().mean((1, 2, 3)), {}
def red(images, prompts, metadata): return images[:, 0].mean((1, 2)), {}
"""
REWARD = "jpeg_compressibility,their_rewards:Above:0.5,their_rewards:red:-1"
NAMES = ["vlm", "m:f"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/a/b", "/a/b"),
        ("http://x/?a=1,b=2", "http://x/?a=1,b=2"),
        ("vlm=/a=1,b=2", {"vlm": "/a=1,b=2"}),
        ("vlm=http://x/?a=1,m:f=cuda:1", {"vlm": "http://x/?a=1", "m:f": "cuda:1"}),
        ("other=/a", "other=/a"),
    ],
)
def test_values_of_rewards_by_their_names(text, found):
    assert by_reward(text, NAMES) == found


def test_options_become_arguments_of_constructors():
    given = RewardArguments(
        reward_model="vlm=a,m:f=b", reward_device="cuda:1", reward_offload=True, reward_options='{"batch_size": 4}'
    )
    assert given.constructor_options(NAMES) == {
        "model": {"vlm": "a", "m:f": "b"},
        "device": "cuda:1",
        "offload": True,
        "batch_size": 4,
    }
    assert RewardArguments().constructor_options(NAMES) == {}
    with refused(ValueError, "reward_options has 'model', which --reward_model gives too"):
        RewardArguments(reward_model="a", reward_options={"model": "b"}).constructor_options(NAMES)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--reward_options", "["], "reward_options is '[' but must be a JSON object"),
        (["--reward_options", '{"api_key": "k"}'], "reward_options has api_key, which would be recorded"),
        (["--reward", "jpeg_compressibility:nan"], "has the weight nan"),
        (["--reward", "jpeg_compressibility", "--reward_model", "x"], "no reward option 'model'"),
        (["--reward", "jpeg_compressibility", "--eval_reward", "nothing"], "reward is 'nothing'"),
        (["--eval_freq", "0"], "eval_freq is 0"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddpo_fast.pipeline.load_pipeline", None)
    assert said in error_of_command(["train", "--mixed_precision", "no", *options])


@pytest.fixture(scope="module")
def trained(model_dir, tmp_path_factory):
    """A folder with the module of the rewards, and a run with three of them and another to evaluate by."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "their_rewards.py").write_text(CODE)
    here = os.getcwd()
    os.chdir(folder)
    try:
        cli.main(
            [
                *("train", *OPTIONS, "--output_dir", "run", "--pretrained_model", model_dir, "--reward", REWARD),
                *("--reward_options", '{"limit": 0.25}', "--reward_model", "their_rewards:Above=.", "--eval_freq", "1"),
                *("--eval_reward", "jpeg_incompressibility", "--eval_prompts", "demo_animals", "--eval_num_images=4"),
            ]
        )
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def copied(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_rewards", raising=False)
    yield tmp_path
    sys.modules.pop("their_rewards", None)


def test_a_run_with_several_rewards_records_them(trained):
    [epoch] = metrics_of(trained / "run", "epoch")
    for name in ("jpeg_compressibility", "their_rewards:Above", "their_rewards:red"):
        assert epoch[f"reward/{name}_std"] > 0
    assert [record["epoch"] for record in metrics_of(trained / "run", "eval")] == [0, 1]
    assert metrics_of(trained / "run", "eval")[1]["eval/jpeg_incompressibility_mean"] > 0
    assert (trained / "run" / "rewards.png").exists()
    saved = json.loads((trained / "run" / "config.json").read_text())
    assert saved["reward"] == REWARD
    assert saved["import_folders"] == {"reward": str(trained)}
    assert saved["reward_model"] == f"their_rewards:Above={trained}"


def test_a_resumed_run_makes_its_rewards_as_before(copied):
    options, config = train_command.read_options(["--resume_from", "run", "--trust_run", "--reward_device", "cpu"])
    assert (options.reward, options.eval_reward, options.eval_prompts) == (
        REWARD,
        "jpeg_incompressibility",
        "demo_animals",
    )
    assert (options.reward_options, options.reward_device, config.eval_freq) == ({"limit": 0.25}, "cpu", 1)
    assert config.exp_name == "jpeg_compressibility+their_rewards.Above+their_rewards.red"
    with refused(ValueError, "reward_normalize is False, but the run 'run' has True"):
        train_command.read_options(["--resume_from", "run", "--trust_run", "--no_reward_normalize"])
    # another reward is made by its own options
    options, _ = train_command.read_options(
        ["--resume_from", "run", "--output_dir", "other", "--reward", "jpeg_compressibility", "--prompts", "animals"]
    )
    assert (options.reward_options, options.reward_model) == ({}, "")


FOREIGN = {
    "reward": REWARD,
    "eval_reward": "jpeg_compressibility,their_rewards:red",
    "eval_prompts": "their_prompts:prompt",
    "reward_url": "http://elsewhere/v1",
    "reward_options": {"url": "http://elsewhere/v1"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_foreign_run_says_of_its_rewards_needs_trust(name, copied):
    path = copied / "run" / "checkpoints" / "checkpoint_1" / "state.json"
    harmless = {"reward": "jpeg_compressibility:2,jpeg_incompressibility", "reward_options": {}, "import_folders": {}}
    state = {**json.loads(path.read_text()), **harmless}
    write_state(path, state)
    train_command.read_options(["--resume_from", "run"])
    write_state(path, {**state, name: FOREIGN[name]})
    sentence = error_of_command(["train", "--resume_from", "run"])
    assert f"{name}={FOREIGN[name]!r}" in sentence
    assert "--trust_run" in sentence
    assert "their_rewards" not in sys.modules


def test_sample_makes_the_rewards_as_the_run_did(copied, monkeypatch, capsys):
    drawn, made = [], []
    monkeypatch.setattr(pictures, "draw_grid", lambda *arguments: drawn.append(arguments))
    monkeypatch.setattr(SeveralRewards, "__call__", lambda several, images, *_: made.append(several) or ([1.0], {}))
    asked = ["sample", "run", "--num-images", "1"]
    cli.main([*asked, "--trust_run"])
    assert [made[0].parts["their_rewards:Above"].limit, made[0].weights["their_rewards:red"]] == [0.25, -1]
    sys.modules.pop("their_rewards")
    cli.main(asked)
    assert "no rewards are shown" in capsys.readouterr().out
    assert "their_rewards" not in sys.modules
    cli.main([*asked, "--reward", "their_rewards:Above:1", "--reward_options", '{"limit": 0.75}'])
    assert made[-1].parts["their_rewards:Above"].limit == 0.75


# the trial before a run


def test_a_reward_is_tried_on_images_of_the_runs_device():
    """No run can be on the meta device, but a reward can see where its images are."""
    seen = []

    def reward(images, prompts, metadata):
        seen.append((images.device.type, tuple(images.shape), images.dtype))
        return [0.0] * len(images), {}

    try_reward(reward, (("a cat",), ({},)), (8, 16), torch.device("meta"))
    assert seen == [("meta", (2, 3, 8, 16), torch.float32)]


@pytest.mark.parametrize(
    ("has_gpu", "kwargs", "environment", "device"),
    [
        (False, {}, {}, "cpu"),
        (True, {}, {}, "cuda:0"),
        (True, {}, {"LOCAL_RANK": "2"}, "cuda:2"),
        (True, {"cpu": True}, {}, "cpu"),
        (True, {}, {"ACCELERATE_USE_CPU": "true"}, "cpu"),
    ],
)
def test_the_device_of_a_run_before_it_begins(has_gpu, kwargs, environment, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert device_of(DDPOConfig(accelerator_kwargs=kwargs)) == torch.device(device)
