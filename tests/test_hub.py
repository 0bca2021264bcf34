"""The model card, and pushes to the Hub that are refused before anything is trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import constants

from ddpo_fast import cli
from ddpo_fast.run_folder import hub


def test_the_card_says_what_was_trained_and_how_to_load_it(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(use_lora=True, num_epochs=1)
    trainer.run_settings.update(reward="my_rewards:cats|dogs", prompts="/home/me/prompts.txt")
    trainer.save_model()
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "| reward | my_rewards:cats\\|dogs |" in card
    assert "| prompts | prompts.txt |" in card
    assert "/home/me" not in card
    assert "| lora_rank | 4 |" in card
    assert "| train_learning_rate | 0.001 |" in card
    (path,) = set(re.findall(r'(?:from_pretrained|load_lora_weights)\("(.*)"\)', card))
    assert (Path(path) / "model_index.json").exists()
    assert path == "run/final"


def test_a_folder_outside_the_working_directory_is_named_by_its_full_path(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    make_trainer().save_model(tmp_path / "my model")
    assert f'from_pretrained("{tmp_path}/my model")' in (tmp_path / "my model" / "README.md").read_text()


def test_the_card_of_functions_that_the_command_line_cannot_name(make_trainer, tmp_path):
    make_trainer().save_model()
    assert "| reward | brightness |" in (tmp_path / "run" / "final" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "offline", "token", "words"),
    [
        ("a folder", False, "x", "takes no repository"),
        ("run", True, "x", "HF_HUB_OFFLINE is set"),
        ("run", False, None, "nobody is logged in"),
        ("run", False, "x", "does not answer (no route)"),
        ("run", False, "good", ""),
    ],
)
def test_reasons_why_a_model_cannot_be_pushed(name, offline, token, words, monkeypatch):
    def whoami(**_):
        if token != "good":
            raise ConnectionError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "get_token", lambda: token)
    monkeypatch.setattr(hub, "whoami", whoami)
    problem = hub.push_problem(name)
    assert words in problem
    assert bool(problem) == bool(words)


def test_an_impossible_push_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="push_to_hub is True, but HF_HUB_OFFLINE is set"):
        cli.main(["train", "--push_to_hub", "--output_dir", "run"])
    assert not (tmp_path / "run").exists()
