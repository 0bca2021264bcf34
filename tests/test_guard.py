"""The weights of the best epoch come back when the reward falls, and only then."""

from __future__ import annotations

import pytest
import torch
from compare_runs import metrics_of, same_bits, trained_weights

from ddpo_fast.guard import AVERAGED_EPOCHS, SHRINKS_BY

SETTINGS = {"sample_num_steps": 2, "sample_batch_size": 8, "sample_num_batches_per_epoch": 1, "train_batch_size": 8}
SETTINGS |= {"train_gradient_accumulation_steps": 1, "train_guard": True}
PROMPTS = ["a cat"] * 8


class Script:
    """A reward that follows a script: the mean of each epoch, with a spread of 0.1 that is the same in all."""

    def __init__(self, means: list[float]) -> None:
        self.means, self.calls = means, 0

    def __call__(self, images, prompts, metadata):
        mean = self.means[self.calls]
        self.calls += 1
        return mean + 0.1 * torch.linspace(-1, 1, len(images)), {}


def run(make_trainer, means: list[float], **settings):
    """A trainer after as many epochs as there are `means`, and its weights when each epoch was sampled."""
    settings = {"prompts": lambda: ("a cat", {}), **SETTINGS, **settings}
    trainer = make_trainer(reward=Script(means), num_epochs=len(means), **settings)
    sampled, watch = [], trainer.guard.watch

    def watched(rewards, prompts, spread):
        sampled.append({name: value.clone() for name, value in trained_weights(trainer).items()})
        return watch(rewards, prompts, spread)

    trainer.guard.watch = watched
    trainer.train()
    return trainer, sampled


@pytest.mark.parametrize(
    "settings",
    [{}, {"mixed_precision": "bf16"}, {"mixed_precision": "bf16", "offload": "optimizer"}, {"use_lora": True}],
    ids=str,
)
def test_a_fall_brings_the_guard_back(make_trainer, settings, caplog):
    # the best pair of epochs is (1, 2): its later weights are those that sampled epoch 2
    trainer, sampled = run(make_trainer, [0.0, 1.0, 1.1, 0.2, 0.2], **settings)
    assert trainer.guard.returns == 1
    assert "fell from 1.050 to 0.650" in caplog.text
    # epoch 3 was given up without an update, so that epoch 4 was sampled by the best weights
    assert same_bits(sampled[4], sampled[2])
    assert not same_bits(sampled[3], sampled[2])
    assert [info["epoch"] for info in metrics_of(trainer, "update")] == [0, 1, 2, 4]
    assert trainer.engine.rate.shrunk == SHRINKS_BY
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(SHRINKS_BY * trainer.config.train_learning_rate)


def test_noise_is_no_fall(make_trainer, tmp_path):
    """The standard error of an epoch's mean of 8 rewards in +-0.1 is 0.023, and 2.5 of two pairs' difference 0.058."""
    means = [0.0, 0.2, 0.25, 0.2, 0.22, 0.18, 0.2]
    trainer, _ = run(make_trainer, means)
    assert trainer.guard.returns == 0
    assert trainer.engine.rate.shrunk == 1
    trainer, _ = run(make_trainer, [0.0, 0.2, 0.25, 0.1, 0.1], output_dir=tmp_path / "fall")
    assert trainer.guard.returns == 1


def test_after_a_return_the_best_is_measured_again(make_trainer):
    """Else one lucky epoch would be the best for ever, and each pair of epochs after it a fall."""
    trainer, _ = run(make_trainer, [0.0, 1.0, 1.1, 0.4, 0.5, 0.5, 0.5, 0.5])
    assert trainer.guard.returns == 1


def test_the_step_shrinks_as_variety_is_lost(make_trainer):
    guard = make_trainer(**SETTINGS).guard
    # the mean of the first two epochs is 0.5, so the step shrinks at 0.3, 0.27, 0.243, 0.2187, ...
    seen = []
    for spread in (0.6, 0.4, 0.31, 0.29, 0.28, 0.26, 0.4, 0.26, 0.22):
        guard.watch(torch.zeros(8), PROMPTS, torch.tensor(spread))
        seen.append(guard.engine.rate.shrunk)
    assert seen == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    guard.watch(torch.zeros(8), PROMPTS, torch.tensor(0.21))
    guard.watch(torch.zeros(8), PROMPTS, None)
    assert guard.engine.rate.shrunk == 0.0625
    assert guard.returns == 0


def test_lost_variety_brings_the_best_weights_back(make_trainer, caplog):
    """However high the reward: the images of a prompt differ by 0.5 at the start, and at 0.16 most of that is lost."""
    trainer = make_trainer(**SETTINGS)
    guard, (weight, *_) = trainer.guard, trainer.guard.parameters
    start = weight.detach().clone()

    def epoch(spread: float, reward: float = 0.0) -> bool:
        """Changes the weights if the epoch is trained on."""
        goes_back = guard.watch(torch.full((8,), reward), PROMPTS, torch.tensor(spread))
        if not goes_back:
            with torch.no_grad():
                weight.add_(1.0)
        return goes_back

    # without weights that were kept there is nothing to go back to
    assert not epoch(0.5)
    assert not epoch(0.5)
    kept = start + 1
    assert epoch(0.16, reward=9.0)
    assert torch.equal(weight.detach(), kept)
    assert "differ by 0.160, and by 0.500 at the start: training goes on from the best weights" in caplog.text
    assert guard.engine.rate.shrunk == SHRINKS_BY
    # The kept weights may have little more themselves, as an epoch's images are few. They are trained on once more.
    assert not epoch(0.16)
    assert epoch(0.16)
    assert torch.equal(weight.detach(), kept)
    assert guard.returns == 2


def test_adam_forgets_where_it_went(make_trainer):
    trainer = make_trainer(num_epochs=1, **SETTINGS)
    trainer.train()
    state = next(iter(trainer.optimizer.state.values()))
    assert state["exp_avg"].any()
    trainer.engine.forget_direction()
    assert not state["exp_avg"].any()
    assert state["exp_avg_sq"].any()


def test_a_resumed_run_has_the_same_bits(make_trainer, tmp_path):
    means = [0.0, 1.0, 1.1, 0.9, 0.2, 0.2]
    settings = {"prompts": lambda: ("a cat", {}), "num_epochs": len(means), **SETTINGS}
    whole = make_trainer(output_dir=tmp_path / "whole", reward=Script(means), **settings)
    whole.train()
    assert whole.guard.returns == 1
    make_trainer(output_dir=tmp_path / "parts", reward=Script(means), **settings).train(epochs=4)
    settings["resume_from"] = str(tmp_path / "parts")
    resumed = make_trainer(output_dir=tmp_path / "parts", reward=Script(means[4:]), **settings)
    resumed.train()
    assert resumed.guard.returns == 1
    assert same_bits(trained_weights(whole), trained_weights(resumed))


def test_without_the_setting_nothing_is_kept(make_trainer):
    assert AVERAGED_EPOCHS == 2
    trainer = make_trainer(num_epochs=1, **{**SETTINGS, "train_guard": False})
    assert trainer.guard is None


def test_other_prompts_are_no_fall(make_trainer):
    """Prompts differ by 2 and images of a prompt by 0.1: which prompts an epoch draws moves its mean, but not back."""
    guard = make_trainer(**SETTINGS).guard
    noise = 0.1 * torch.tensor([-1.0, 1.0, -1.0, 1.0])

    def epoch(level: float, *prompts: str) -> bool:
        effects = {"easy": 2.0, "hard": 0.0}
        rewards = torch.cat([level + effects[prompt] + noise for prompt in prompts])
        return guard.watch(rewards, [prompt for prompt in prompts for _ in range(4)])

    # the plain means of pairs of epochs fall from 2 to 1, and the level rises from 0 to 0.6
    assert not epoch(0.0, "easy", "hard", "easy")
    assert not any(
        epoch(0.2 * i, *prompts) for i, prompts in enumerate((["easy"], ["hard", "easy"], ["hard"]), start=1)
    )
    assert guard.returns == 0
