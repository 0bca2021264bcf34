"""Bounded updates: the distance is the formula's, long updates are shortened, and the learning rate follows."""

from __future__ import annotations

import math

import pytest
import torch
from compare_runs import metrics_of, same_bits, trained_weights
from torch import nn

from ddpo_fast import ops
from ddpo_fast.bounded_update import FASTEST_RISE, TOLERANCE
from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine.optimizers import LearningRate

# two updates an epoch of all weights, with a learning rate that is far too large for the target
SETTINGS = {
    "use_lora": False,
    "sample_batch_size": 4,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 4,
    "train_gradient_accumulation_steps": 1,
    "train_learning_rate": 3e-3,
    "train_target_update": 0.01,
    "step_credit": "none",
}


def watched(trainer) -> list[tuple[list[float], float, float]]:
    """For each update: distances of its measured pairs from outputs recomputed here, its logged distance and share."""
    bound, seen = trainer.ppo.bound, []
    begin, step = bound.begin, trainer.engine.step
    state: dict = {}

    def outputs(calls):
        with torch.no_grad():
            found = [trainer.policy.output(c.latents, c.timesteps, c.embeds) for c in calls]
            return torch.cat([ops.guided(out, trainer.config.sample_guidance_scale) for out in found]).double()

    def begin_and_keep(calls):
        begin(calls)
        state["calls"], state["before"] = calls, outputs(calls)

    def step_and_measure(*args):
        result = step(*args)
        table = trainer.policy.noise_table[torch.cat([c.timesteps for c in state["calls"]])].double()
        moved = table[:, 1, None] * (outputs(state["calls"]) - state["before"]).flatten(1) / table[:, 2, None]
        metrics = bound.metrics
        seen.append((moved.square().mean().sqrt().item(), metrics["update_distance"].item(), metrics["update_share"]))
        return result

    bound.begin, trainer.engine.step = begin_and_keep, step_and_measure
    return seen


def test_a_learning_rate_that_is_far_too_large_moves_the_policy_by_the_target(make_trainer):
    trainer = make_trainer(num_epochs=3, **SETTINGS)
    seen = watched(trainer)
    trainer.train()
    assert len(seen) == 6
    assert seen[0][2] < 0.5, "the first update was not shortened"
    for distance, logged, _ in seen:
        assert distance <= TOLERANCE * 0.01
        # fp32 against fp64, of outputs that differ by a hundredth of themselves
        assert logged == pytest.approx(distance, rel=1e-3)
    rates = [info["rate_factor"] for info in metrics_of(trainer, "update")]
    assert rates[0] == 1
    assert rates[-1] < 0.5


def test_a_learning_rate_that_is_far_too_small_rises(make_trainer):
    trainer = make_trainer(num_epochs=2, **{**SETTINGS, "train_learning_rate": 1e-7})
    trainer.train()
    updates = metrics_of(trainer, "update")
    assert [info["rate_factor"] for info in updates] == pytest.approx([FASTEST_RISE**i for i in range(4)])
    assert [info["update_share"] for info in updates] == pytest.approx([FASTEST_RISE] * 4)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-7 * FASTEST_RISE**4)


def test_without_a_target_nothing_is_measured(make_trainer):
    trainer = make_trainer(num_epochs=1, **{**SETTINGS, "train_target_update": 0.0})
    trainer.train()
    assert trainer.ppo.bound is None
    assert "update_distance" not in metrics_of(trainer, "update")[0]


def test_a_resumed_run_has_the_same_bits(make_trainer, tmp_path):
    settings = {"num_epochs": 3, "prompts": lambda: ("a cat", {}), **SETTINGS}
    whole = make_trainer(output_dir=tmp_path / "whole", **settings)
    whole.train()
    make_trainer(output_dir=tmp_path / "parts", **settings).train(epochs=1)
    resumed = make_trainer(output_dir=tmp_path / "parts", resume_from=str(tmp_path / "parts"), **settings)
    assert resumed.engine.rate.factor != 1
    resumed.train()
    assert same_bits(trained_weights(whole), trained_weights(resumed))


@pytest.mark.parametrize(
    "settings",
    [
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "offload": "optimizer"},
        {"mixed_precision": "bf16", "stochastic_rounding": True},
        {"train_max_grad_norm": math.inf, "optimizer_in_backward": True, "train_micro_batch_size": 100},
    ],
    ids=["half", "offload", "rounding", "in backward"],
)
@pytest.mark.parametrize("share", [0.25, 1.5])
def test_every_engine_multiplies_its_update(make_trainer, settings, share):
    trainer = make_trainer(num_epochs=1, **{**SETTINGS, **settings})
    engine = trainer.engine
    masters = engine.weights.masters
    steps = []

    def settle() -> float:
        # the first call of an update sees all of it
        seen.append([m.detach().clone() for m in masters])
        return share if len(seen) == 1 and not settings.get("optimizer_in_backward") else 1.0

    step, seen = engine.step, []

    def watched_step(*_):
        seen.clear()
        before = [m.detach().clone() for m in masters]
        result = step(settle)
        steps.append((before, seen[0], [m.detach().clone() for m in masters]))
        return result

    engine.step = watched_step
    trainer.train()
    before, whole, kept = (torch.cat([m.flatten().double() for m in part]) for part in steps[0])
    if settings.get("optimizer_in_backward"):
        # the weights had changed before the copy could be made
        assert torch.equal(kept, whole)
    elif settings.get("stochastic_rounding"):
        exact = before + share * (whole - before)
        # Rounded at random, each weight is within one step of bf16, which has 8 bits, and right on average: the mean
        # error of n values within +-1 is normal with a standard deviation of at most 1/sqrt(n).
        step = 2.0 ** (exact.abs().clamp(min=1e-30).log2().floor() - 7)
        error = (kept - exact) / step
        assert error.abs().max() <= 1
        assert error.mean().abs() < 5 / math.sqrt(error.numel())
    else:
        # fp32 rounds the weight and the difference, each by 2^-24 of it
        torch.testing.assert_close(kept, before + share * (whole - before), rtol=2**-22, atol=1e-10)
    # the network computes with the weights that were kept
    with engine.computing():
        for weight, master in zip(engine.weights.weights, masters, strict=True):
            assert torch.equal(weight, master.detach().to(weight.dtype))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_schedules(name):
    config = DDPOConfig(num_epochs=10, train_warmup_steps=4, train_lr_scheduler=name, sample_num_batches_per_epoch=2)
    assert config.num_updates == 20
    rate = LearningRate(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5), config)
    shares = [rate.share(updates) for updates in range(25)]
    assert shares[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    expected = {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
        # a single period, and polynomial of the first power, which ends at 1e-7
        "cosine_with_restarts": lambda x: (1 + math.cos(math.pi * x)) / 2,
        "polynomial": lambda x: 1e-7 + (1 - 1e-7) * (1 - x),
    }[name]
    assert shares[3:19] == pytest.approx([expected(n / 16) for n in range(16)])
    # beyond the planned updates the last rate stays, which is above zero
    assert shares[19:] == [shares[19]] * 6
    assert shares[19] > 0
    rate.factor = 0.5
    rate.set_for(0)
    assert rate.optimizer.param_groups[0]["lr"] == 0.5 * 0.25 * 0.5


def test_targets_fall_with_the_root_of_the_number_of_updates(make_trainer):
    trainer = make_trainer(num_epochs=3, train_target_decay=2, **SETTINGS)
    seen = watched(trainer)
    trainer.train()
    assert len(seen) == 6
    for update, (distance, _, _) in enumerate(seen):
        target = 0.01 / math.sqrt(1 + update / 2)
        assert distance == pytest.approx(target, rel=TOLERANCE - 1)


def test_a_falling_target_needs_a_target():
    with pytest.raises(ValueError, match="train_target_decay is above 0, which needs train_target_update"):
        DDPOConfig(train_target_decay=8).check()
