"""Rewards that score images of fixed prompts and noise every few epochs, without being trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compare_runs import metrics_of, same_bits, trained_weights, without_timings
from one_sentence import refused
from tiny_run import brightness

from ddpo_fast.random_state import random_state
from ddpo_fast.rewards import SeveralRewards
from ddpo_fast.run_folder import pictures

SETTINGS = {"sample_num_steps": 2, "num_epochs": 2, "eval_freq": 1, "eval_num_images": 6, "prompts": "animals"}
PROMPTS = "demo_animals"


def contrast(images, prompts, metadata):
    # draws and seeds, which training must not notice
    torch.manual_seed(len(prompts))
    np.random.seed(0)
    return images.std((1, 2, 3)), {}


@pytest.fixture
def evaluated(make_trainer):
    def make(**options):
        parts = SeveralRewards({"bright": brightness, "contrast": contrast}, {"bright": 1, "contrast": 1})
        return make_trainer(eval_reward=parts, eval_prompts=PROMPTS, **SETTINGS | options)

    return make


def test_training_is_as_without_and_a_resumed_run_as_one_that_went_on(make_trainer, evaluated, tmp_path):
    whole = evaluated()
    whole.train()
    records = metrics_of(whole, "eval")
    assert [(record["epoch"], record["updates"]) for record in records] == [(0, 0), (1, 2), (2, 4)]
    assert records[0]["eval/bright_mean"] != records[1]["eval/bright_mean"]
    assert records[0]["eval/contrast_std"] > 0

    without = make_trainer(output_dir=tmp_path / "without", **SETTINGS)
    without.train()
    assert same_bits(trained_weights(whole), trained_weights(without))

    evaluated(output_dir=tmp_path / "again", num_epochs=1).train()
    again = evaluated(output_dir=tmp_path / "again", resume_from=str(tmp_path / "again"))
    again.train()
    assert same_bits(trained_weights(whole), trained_weights(again))
    lines = [[without_timings(record) for record in metrics_of(trainer)] for trainer in (whole, again)]
    assert lines[0] == lines[1]


def test_prompts_and_noise_stay_the_same(evaluated):
    trainer = evaluated()
    evaluation = trainer.evaluation
    assert sorted(set(evaluation.prompts)) == sorted(["an owl", "a panda", "a penguin", "a lion"])
    assert evaluation.prompts[:2] == evaluation.prompts[4:]
    before = random_state()
    first, second = evaluation.scores(), evaluation.scores()
    assert {name: values.tolist() for name, values in first.items()} == {n: v.tolist() for n, v in second.items()}
    # the same prompt twice, with other noise
    assert len(set(first["bright"].tolist())) == 6
    assert torch.equal(random_state()["torch"], before["torch"])


def test_a_function_is_logged_by_its_name_and_its_error_stops_the_run(make_trainer, evaluated):
    def fails(images, prompts, metadata):
        raise OSError("no answer")

    trainer = make_trainer(eval_reward=fails, **SETTINGS)
    with pytest.raises(RuntimeError, match=r"fails' raised OSError: no answer"):
        trainer.train()
    with refused(ValueError, "eval_reward_function is 3 .* but must be a function"):
        make_trainer(eval_reward=3, **SETTINGS)
    with refused(ValueError, "reward is 'nothing'"):
        make_trainer(eval_reward="nothing", **SETTINGS)
    with refused(ValueError, "eval_freq is 0 but must be a whole number of at least 1"):
        make_trainer(eval_reward="jpeg_compressibility", **SETTINGS | {"eval_freq": 0})


def test_each_reward_has_a_curve_of_its_own(tmp_path):
    epoch = {"kind": "epoch", "images": 4, "elapsed_s": 60.0, "reward_mean": 1.0, "reward_std": 2.0}
    epoch |= {"reward/a_mean": 3.0, "reward/a_std": 4.0}
    held_out = {"kind": "eval", "images": 16, "elapsed_s": 30.0, "eval/b_mean": 5.0, "eval/b_std": 8.0}
    records = [held_out, epoch, {"kind": "update", "loss_mean": 1}, epoch, held_out]
    assert pictures.reward_curves(records) == {
        "reward": [(4, 1.0, 1.0, 1.0), (8, 1.0, 1.0, 1.0)],
        "reward/a": [(4, 1.0, 3.0, 2.0), (8, 1.0, 3.0, 2.0)],
        "eval/b": [(0, 0.5, 5.0, 2.0), (8, 0.5, 5.0, 2.0)],
    }
    pictures.draw_rewards(records, tmp_path / "rewards.png")
    assert (tmp_path / "rewards.png").stat().st_size > 1000
