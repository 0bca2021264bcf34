"""`spatial_credit`: the gradient by the model's output, with each spatial frequency multiplied by its credit."""

from __future__ import annotations

import math

import pytest
import torch
from compare_runs import metrics_of, same_bits, trained_weights

from ddpo_fast.spatial_credit import spatially_credited
from ddpo_fast.trainer import DDPOTrainer


def by_matrices(gradient: torch.Tensor, power: float) -> torch.Tensor:
    """The definition in fp64, by matrices of complex exponentials."""
    height, width = gradient.shape[-2:]
    waves, frequencies = [], []
    for size in (height, width):
        numbers = torch.arange(size, dtype=torch.float64)
        # periods a pixel, from -1/2 to 1/2
        frequency = (numbers / size + 0.5) % 1 - 0.5
        waves.append(torch.exp(-2j * math.pi * numbers[:, None] * numbers / size) / math.sqrt(size))
        frequencies.append(frequency)
    f = (frequencies[0][:, None] ** 2 + frequencies[1] ** 2).sqrt().clamp(0.5 / max(height, width), 0.5)
    spectrum = waves[0] @ gradient.to(torch.complex128) @ waves[1].T
    return (waves[0].mH @ (spectrum * (2 * f) ** power) @ waves[1].conj()).real


@pytest.mark.parametrize("size", [(16, 16), (8, 12), (5, 7), (1, 3), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.half, 2**-11)],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_definition(size, dtype, rounding, layout):
    gradient = torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient = gradient.to(dtype).to(memory_format=layout)
    found = spatially_credited(gradient, 0.75)
    assert found.dtype == dtype
    assert found.stride() == gradient.stride()
    expected = by_matrices(gradient.double(), 0.75)
    # the result is rounded once to its dtype; in fp32 the transforms round as well, a few times
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=rounding * expected.abs().max().item())


def test_what_it_does_to_a_mean_and_to_waves():
    ones = torch.ones(1, 1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(spatially_credited(ones, 1.0), ones / 16)
    columns = torch.arange(16, dtype=torch.float64)
    for periods in (1, 2, 4, 8):
        wave = torch.cos(2 * math.pi * periods * columns / 16).expand(1, 1, 16, 16)
        torch.testing.assert_close(spatially_credited(wave, 0.75), wave * (periods / 8) ** 0.75)
    # above the highest frequency of a row or a column, which only diagonal waves are
    checkerboard = (-1.0) ** (columns + columns[:, None]).expand(1, 1, 16, 16)
    torch.testing.assert_close(spatially_credited(checkerboard, 0.75), checkerboard)


def test_without_a_credit_the_gradient_is_the_same_tensor():
    gradient = torch.randn(2, 4, 8, 8)
    assert spatially_credited(gradient, 0) is gradient


@pytest.mark.parametrize("objective", ["ddpo_sf", "ddpo_is", "rwr"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_an_update_has_the_gradient_of_the_weighted_frequencies(make_trainer, objective, guidance):
    """Against autograd of the sum over frequencies of their part of the loss, times their credit.

    At a ratio of 1 the gradient of all three losses is linear in the distance e from the step's mean (or from the
    noise), so crediting the gradient is the same as a loss with e credited: `credit(e) . output`.
    """
    settings = {"num_epochs": 1, "train_batch_size": 4, "train_gradient_accumulation_steps": 2}
    trainer = make_trainer(objective=objective, spatial_credit=0.75, sample_guidance_scale=guidance, **settings)
    calls = []
    score = trainer.ppo.objective.score

    def score_and_keep(output, reference, pairs, scale):
        scored = score(output, reference, pairs, scale)
        calls.append((pairs, scored.gradient.clone()))
        return scored

    trainer.ppo.objective.score = score_and_keep
    step, seen = trainer.engine.step, {}

    def step_and_compare(*args):
        weights = trainer.engine.weights
        seen["found"] = [gradient.detach().double().clone() for gradient in weights.gradients]
        trainer.engine.zero_gradients()
        with torch.enable_grad():
            for pairs, gradient in calls:
                output = trainer.policy.output(pairs.latents, pairs.timesteps, pairs.embeds)
                (by_matrices(gradient.double(), 0.75) * output.double()).sum().backward()
        seen["expected"] = [gradient.detach().double().clone() for gradient in weights.gradients]
        return step(*args)

    trainer.engine.step = step_and_compare
    trainer.train()
    found, expected = (torch.cat([g.flatten() for g in seen[name]]) for name in ("found", "expected"))
    # fp32: sums over pairs and pixels of numbers that partly cancel
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert expected.norm() > 0


def test_a_resumed_run_has_the_same_bits_and_credits_change_the_update(make_trainer, tmp_path):
    settings = {"num_epochs": 2, "prompts": lambda: ("a cat", {}), "train_target_update": 0.05}
    whole = make_trainer(output_dir=tmp_path / "whole", spatial_credit=0.75, **settings)
    whole.train()
    make_trainer(output_dir=tmp_path / "parts", spatial_credit=0.75, **settings).train(epochs=1)
    resumed = make_trainer(
        output_dir=tmp_path / "parts", resume_from=str(tmp_path / "parts"), spatial_credit=0.75, **settings
    )
    resumed.train()
    assert same_bits(trained_weights(whole), trained_weights(resumed))
    plain = make_trainer(output_dir=tmp_path / "plain", **settings)
    plain.train()
    assert not same_bits(trained_weights(whole), trained_weights(plain))
    # the first rollout is the same: ratios and log-probs have no credit
    drifts = [metrics_of(trainer, "update")[0]["ratio_drift"] for trainer in (whole, plain)]
    assert drifts[0] == drifts[1]


class OwnLoss(DDPOTrainer):
    def loss(self, advantages, clip_range, ratio):
        return super().loss(advantages, clip_range, ratio)


def test_a_loss_of_ones_own_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"spatial_credit is 0\.75, but the loss .* is overridden"):
        make_trainer(spatial_credit=0.75, trainer_class=OwnLoss)
