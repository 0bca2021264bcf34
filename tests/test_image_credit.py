"""CoCA's credit: what a step predicts, its similarity to the final latent, and the share that follows."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from rounding import in_fp64
from tiny_run import Prompts, build_pipeline

from ddpo_fast import DefaultDDPOStableDiffusionPipeline
from ddpo_fast.ddim import DDIMCoefficients, predictions
from ddpo_fast.image_credit import similarities, step_credit
from ddpo_fast.prompts import PromptGroups
from ddpo_fast.tiny_sd.build import SCHEDULER
from ddpo_fast.trajectory import pair_index, pairs_of, training_batches


def predicted(kind: str, output: torch.Tensor, latents: torch.Tensor, a_t: torch.Tensor) -> torch.Tensor:
    """The final latents that an output predicts, by the formulas at the top of ddim.py."""
    if kind == "epsilon":
        return (latents - (1 - a_t).sqrt() * output) / a_t.sqrt()
    return output if kind == "sample" else a_t.sqrt() * latents - (1 - a_t).sqrt() * output


@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("steps", [4, 50])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_prediction_follows_from_a_steps_latents_and_noise(kind, steps, eta):
    scheduler = DDIMScheduler(**SCHEDULER, prediction_type=kind)
    scheduler.set_timesteps(steps)
    table = DDIMCoefficients.from_scheduler(scheduler, eta, "cpu").table.double()
    generator = torch.Generator().manual_seed(0)
    found = predictions(scheduler, eta)
    assert len(found) == steps
    for t, prediction in zip(scheduler.timesteps, found, strict=True):
        output, latents, noise = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
        c_x, c_m, sigma, _ = table[t]
        following = c_x * latents + c_m * output + sigma * noise
        expected = predicted(kind, output, latents, scheduler.alphas_cumprod[t].double())
        # the table is in fp32, 6e-8, and the last steps divide what they change by a small number
        torch.testing.assert_close(prediction.of(latents, following, noise), expected, rtol=1e-4, atol=1e-4)


def by_the_papers_code(similarity: torch.Tensor, window: int) -> torch.Tensor:
    """R_j by loops, for steps that the windows divide."""
    after = [*similarity[1:].tolist(), 1.0]
    means = [sum(after[start : start + window]) / window for start in range(0, len(after), window)]
    gains = [mean - before for before, mean in zip([float(similarity[0]), *means[:-1]], means, strict=True)]
    shares = [gain / (sum(gains) * window) for gain in gains for _ in range(window)]
    return torch.tensor([sum(shares[j:]) for j in range(len(shares))], dtype=torch.float64)


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_credit_is_the_papers(steps):
    similarity = torch.rand(3, steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(1).values
    for row, credit in zip(similarity, step_credit(similarity), strict=True):
        torch.testing.assert_close(credit, by_the_papers_code(row, max(1, steps // 10)), rtol=1e-9, atol=1e-9)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40))
def test_credit_is_finite_and_begins_with_one(values):
    (credit,) = step_credit(torch.tensor([values], dtype=torch.float64))
    assert credit.isfinite().all()
    assert credit[0] == pytest.approx(1, abs=1e-6)


def test_an_image_whose_prediction_never_moves_has_equal_credit():
    assert (step_credit(torch.ones(2, 7)) == 1).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_sampling_collects_the_credit(make_trainer, tmp_path, prediction_type):
    build_pipeline(prediction_type).save_pretrained(tmp_path / "model")
    trainer = make_trainer(model=tmp_path / "model", train_image_credit="coca", sample_guidance_scale=1.0)
    in_fp64(trainer)
    unet, pipe = trainer.sd_pipeline.unet, trainer.sd_pipeline.sd_pipeline
    outputs = []
    hook = unet.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0]))
    samples, _ = trainer._generate_samples(2, 4)
    hook.remove()
    # both batches are denoised together, after a call that measures how many fit in memory
    trail = torch.cat([sample.trail for sample in samples])
    alphas = pipe.scheduler.alphas_cumprod.double()
    expected = [
        predicted(prediction_type, output, trail[:, i], alphas[t])
        for i, (t, output) in enumerate(zip(pipe.scheduler.timesteps, outputs[-5:], strict=True))
    ]
    credit = step_credit(similarities(expected, trail[:, -1]))
    # the noise table is in fp32
    torch.testing.assert_close(torch.cat([sample.credit for sample in samples]), credit, rtol=1e-3, atol=1e-4)


class Replayed:
    """Writes each call's outputs into those of the first call, as the replay of a CUDA graph does."""

    def __init__(self, function) -> None:
        self.function, self.outputs = function, None

    def __call__(self, *arguments):
        found = self.function(*arguments)
        if self.outputs is None:
            self.outputs = [output.clone() for output in found]
        for kept, output in zip(self.outputs, found, strict=True):
            kept.copy_(output)
        return self.outputs


def test_a_replayed_step_has_the_same_credit(make_trainer):
    trainer = make_trainer(train_image_credit="coca", sample_batch_size=2)
    credits = []
    for replays in (False, True):
        torch.manual_seed(3)
        draws = [trainer.rollout.draw(PromptGroups(Prompts(), 1), 2)]
        if replays:
            (chain,) = trainer.rollout._chains.values()
            chain.recorded = Replayed(chain._step)
        credits += [trajectory.credit for trajectory, _ in trainer.rollout.sample(draws)]
    assert torch.equal(*credits)


def test_each_step_is_trained_with_its_own_advantage(make_trainer):
    trainer = make_trainer(train_image_credit="coca", train_skip_last_steps=0.2, sample_group_size=2)
    (trajectory,), _ = trainer._generate_samples(1, 4)
    advantages = torch.arange(20.0).reshape(4, 5)
    advantages[2] = 0
    trajectory = trajectory.with_advantages(advantages).with_steps(range(4))
    assert trajectory.has_advantage.tolist() == [[False, True, True, True], [True] * 4, [False] * 4, [True] * 4]
    by_step = {
        (float(log_prob), int(t)): float(advantage)
        for log_probs, timesteps, row in zip(trajectory.log_probs, trajectory.timesteps, advantages, strict=True)
        for log_prob, t, advantage in zip(log_probs, timesteps, row, strict=False)
    }
    for batches in training_batches(trajectory, 2, 2):
        group = list(batches)
        pairs = pairs_of(group, pair_index(group, 4), guided=True)
        assert pairs.number == 16
        for log_prob, t, advantage in zip(pairs.log_probs, pairs.timesteps, pairs.advantages, strict=True):
            assert by_step[float(log_prob), int(t)] == float(advantage)
        for batch in group:
            assert torch.equal(batch.has_advantage, batch.advantages != 0)


@pytest.mark.parametrize("settings", [{}, {"sample_group_size": 4}, {"per_prompt_stat_tracking": True}])
def test_a_run_with_credit_trains(make_trainer, settings):
    trainer = make_trainer(train_image_credit="coca", num_epochs=1, **settings)
    kept = []
    train_on = trainer._train_on
    trainer._train_on = lambda trajectory, *args: kept.append(trajectory) or train_on(trajectory, *args)
    trainer.train()
    (trajectory,) = kept
    assert trajectory.advantages.shape == (8, 5)
    assert trajectory.credit[:, 0].tolist() == pytest.approx([1.0] * 8)
    assert float(trajectory.advantages.mean()) == pytest.approx(0, abs=1e-5)
    assert float(trajectory.advantages.square().mean()) == pytest.approx(1, abs=1e-4)


class OwnCall(DefaultDDPOStableDiffusionPipeline):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def test_a_pipeline_with_its_own_call_is_refused(make_trainer, model_dir):
    with pytest.raises(ValueError, match="train_image_credit is 'coca', but the pipeline's own __call__"):
        make_trainer(pipeline=OwnCall(model_dir), train_image_credit="coca")
