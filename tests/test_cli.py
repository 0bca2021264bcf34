from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from ddpo_fast import DDPOConfig, cli

ROOT = Path(__file__).parents[1]
OPTIONS = (
    "--num-epochs 1 --sample_num_steps 2 --sample_batch_size 2 --mixed_precision no --prompts animals "
    "--save_freq 1 --train_learning_rate 1e-3"
).split()


@pytest.mark.parametrize(
    "command", [[sys.executable, "ddpo_fast/train.py"], [str(Path(sys.executable).parent / "ddpo-fast"), "train"]]
)
def test_help_lists_every_field(command):
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in [f.name for f in fields(DDPOConfig)] + [f.name for f in fields(cli.RunArguments)]:
        assert f"--{name}" in done.stdout


@pytest.mark.parametrize("kind", [[], ["--full-finetune"]])
def test_train_and_sample(kind, model_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "users_code.py").write_text(
        "def reward(images, prompts, metadata): return images.mean((1, 2, 3)), {}\n"
        "def prompt(): return 'a cat', {'n': 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("users_code", None)
    options = [*OPTIONS, *kind, "--output_dir", "run", "--pretrained_model", model_dir]
    cli.main(["train", *options, "--reward", "users_code:reward", "--prompts", "users_code:prompt"])
    printed = capsys.readouterr().out
    assert "4 images per epoch (2 batches of 2), 2 denoising steps each" in printed
    assert "2 (image, timestep) pairs per update" in printed
    assert "4 updates per epoch" in printed
    run = tmp_path / "run"
    saved = json.loads((run / "config.json").read_text())
    assert saved["reward"] == "users_code:reward"
    assert saved["use_lora"] is not bool(kind)
    for name in ("metrics.jsonl", "rewards.png", "before_after.png", "final/model_index.json"):
        assert (run / name).stat().st_size > 0
    cli.main(["sample", "run", "--num-images", "3"])
    assert (run / "samples.png").stat().st_size > 1000


def test_resume_takes_the_runs_own_settings(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["train", *OPTIONS, "--full-finetune", "--output_dir", "run", "--pretrained_model", model_dir])
    run, config = cli.parse_train_options(["--resume_from", "run", "--num_epochs", "7"])
    assert run.full_finetune
    assert run.pretrained_model == model_dir
    assert (config.num_epochs, config.sample_num_steps, config.train_learning_rate) == (7, 2, 1e-3)
    assert config.output_dir == str(tmp_path / "run")


def test_dashes_underscores_and_json():
    _, config = cli.parse_train_options(["--train-clip-range", "0.1", "--tracker_kwargs", '{"wandb": {"name": "x"}}'])
    assert config.train_clip_range == 0.1
    assert config.tracker_kwargs == {"wandb": {"name": "x"}}
    _, config = cli.parse_train_options(["--no_train_cfg", "--per_prompt_stat_tracking"])
    assert (config.train_cfg, config.per_prompt_stat_tracking) == (False, True)
