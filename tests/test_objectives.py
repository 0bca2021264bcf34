"""Objectives: gradients by their definition in fp64, regression, the reference, and sampling with averages."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compare_runs import metrics_of, same_bits, trained_weights
from diffusers import DDIMScheduler
from rounding import drift_limits
from tiny_run import SETTINGS
from torch import nn

from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine.master_weights import MasterWeights
from ddpo_fast.objectives import OBJECTIVES
from ddpo_fast.rwr import image_weights, noised_batches
from ddpo_fast.trajectory import Pairs, Trajectory

# an epoch of one update, as ddpo_sf needs it: 6 images x 5 steps
ONE_UPDATE = {"sample_batch_size": 6, "sample_num_batches_per_epoch": 1, "train_batch_size": 6}
ONE_UPDATE |= {"train_gradient_accumulation_steps": 1, "train_clip_range": 0.1}
RANKS = {"reward": lambda images, *_: (torch.arange(len(images), dtype=torch.float32), {})}
N, SHAPE, STEPS = 6, (4, 3, 5), 7


@pytest.fixture
def make(make_trainer, narrow_model_dir):
    """`make_trainer` with the smallest model."""
    return lambda **options: make_trainer(**{"model": narrow_model_dir, **options})


# gradients


def scored_and_defined(name, guidance, reference, dtype=torch.float64, scale=None):
    """An objective's `Scored` of N random pairs, and (loss, its gradient) by autograd of the definition in fp64."""
    torch.manual_seed(0)
    settings = {"rwr": {}}.get(name, {"train_kl_weight": 0.3 if reference else 0.0})
    settings |= {"sample_guidance_scale": guidance, "train_adv_clip_max": 1.0, **ONE_UPDATE}
    config = DDPOConfig(objective=name, **settings)
    # c_x, c_m, sigma and credit
    table = torch.rand(STEPS, 4, dtype=torch.float64) + 0.5
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    timesteps = torch.randint(STEPS, (N,))
    latents, after = torch.randn(2, N, *SHAPE, dtype=kept)
    output, other = (torch.randn(2, 2 * N if guidance > 1 else N, *SHAPE, dtype=torch.float64) / 2).to(dtype)
    advantages = torch.tensor([2.0, -1.0, 0.5, 0.0, -3.0, 1.0], dtype=kept).abs() ** (1 if name != "rwr" else 2)
    advantages *= 1 if name == "rwr" else torch.tensor([1, -1, 1, 1, -1, 1])

    wide = output.double().requires_grad_()
    guided = [u + guidance * (t - u) for u, t in (x.chunk(2) for x in (wide, other.double()))] if guidance > 1 else None
    g, g_reference = guided or (wide, other.double())
    c_x, c_m, sigma, credit = (table[timesteps, i][:, None, None, None] for i in range(4))
    log_probs = torch.distributions.Normal(c_x * latents.double() + c_m * g, sigma).log_prob(after.double())
    log_probs = log_probs.mean((1, 2, 3))
    old = log_probs.detach() + 0.05 * torch.randn(N, dtype=torch.float64)
    credit = credit.flatten()
    pulls = advantages.double().clamp(-1, 1)
    if name == "ddpo_is":
        ratio = torch.exp(credit * (log_probs - old))
        terms = torch.maximum(-pulls * ratio, -pulls * ratio.clamp(0.95, 1.05))
    elif name == "ddpo_sf":
        terms = -pulls * credit * log_probs
    else:
        terms = advantages.double() * (after.double() - g).square().mean((1, 2, 3))
    if reference:
        means = [torch.distributions.Normal(c_m * x, sigma) for x in (g, g_reference)]
        terms = terms + 0.3 * credit**2 * torch.distributions.kl_divergence(*means).mean((1, 2, 3))
    loss = terms.mean()
    loss.backward()

    policy = SimpleNamespace(loss_table=table.to(kept), clip_range=0.05)
    objective = OBJECTIVES[name](config, policy, object() if reference else None)
    pairs = Pairs(latents, timesteps, after, old.to(kept), advantages, torch.empty(0))
    return objective.score(output, other if reference else None, pairs, scale), loss.detach(), wide.grad


CASES = [("ddpo_is", False), ("ddpo_is", True), ("ddpo_sf", False), ("ddpo_sf", True), ("rwr", False)]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("name", "reference"), CASES)
def test_gradient_is_that_of_the_definition(name, reference, guidance):
    scored, loss, gradient = scored_and_defined(name, guidance, reference)
    torch.testing.assert_close(scored.loss, loss, rtol=1e-12, atol=1e-12)
    # the closed form and autograd differ by a few roundings of fp64
    assert (scored.gradient - gradient).norm() < 1e-12 * gradient.norm()
    assert gradient.norm() > 0
    assert ("reference_kl" in scored.metrics) == reference


@pytest.mark.parametrize(("name", "reference"), CASES)
def test_gradient_in_half_precision(name, reference):
    """It has the dtype of the output, and the scale keeps it from underflow: it is rounded once, to 11 bits."""
    scored, loss, gradient = scored_and_defined(name, 4.0, reference, torch.float16, torch.tensor(512.0))
    torch.testing.assert_close(scored.loss.double(), loss, rtol=1e-5, atol=1e-5)
    assert scored.gradient.dtype == torch.float16
    assert (scored.gradient.double() / 512 - gradient).norm() < 2**-11 * gradient.norm()


# reward-weighted regression


def test_weights_of_images():
    rewards, prompts = np.array([1.0, 3.0, 2.0, 0.0, 2.0], dtype=np.float32), ["a", "b", "a", "b", "a"]

    def weights(**settings):
        return image_weights(prompts, rewards, DDPOConfig(objective="rwr", **settings))

    powers = np.exp(0.5 * rewards.astype(np.float64))
    np.testing.assert_allclose(weights(rwr_beta=0.5), 5 * powers / powers.sum(), rtol=1e-6)
    within = np.array([3 * powers[0] / powers[[0, 2, 4]].sum(), 2 * powers[1] / powers[[1, 3]].sum()])
    np.testing.assert_allclose(weights(rwr_beta=0.5, rwr_per_prompt=True)[:2], within, rtol=1e-6)
    # the best two of five, of equal ones the first
    assert weights(rwr_top_fraction=0.4).tolist() == [0, 2.5, 2.5, 0, 0]
    # at least one of each prompt
    assert weights(rwr_top_fraction=0.1, rwr_per_prompt=True).tolist() == [0, 2, 3, 0, 0]
    huge = image_weights(prompts, rewards * 1e6, DDPOConfig(objective="rwr"))
    assert huge.tolist() == [0, 5, 0, 0, 0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noised_batches_are_of_the_forward_process(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type, num_train_timesteps=50)
    config = DDPOConfig(objective="rwr", sample_num_steps=8, train_num_inner_epochs=2, **ONE_UPDATE)
    trail = torch.randn(6, 9, *SHAPE)
    embeds = torch.randn(6, 2, 3)
    sampled = Trajectory(
        prompts=("",) * 6,
        prompt_ids=torch.zeros(6, 2),
        prompt_embeds=embeds,
        negative_prompt_embeds=embeds,
        timesteps=torch.zeros(6, 8, dtype=torch.int64),
        trail=trail,
        log_probs=torch.zeros(6, 8),
    ).with_advantages(torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 4.0]))
    epochs = [list(batches) for batches in noised_batches(sampled, scheduler, config)]
    assert [len(batches) for batches in epochs] == [1, 1]
    seen = []
    for (batch,) in epochs:
        # embeddings tell which image a row is
        rows = (batch.prompt_embeds[:, None] == embeds).flatten(2).all(2).int().argmax(1)
        assert sorted(rows.tolist()) == list(range(6))
        assert torch.equal(batch.advantages, sampled.advantages[rows])
        assert torch.equal(batch.has_advantage, batch.advantages != 0)
        final, t = trail[rows, -1].repeat_interleave(8, 0), batch.timesteps.flatten()
        latents, target = batch.latents.flatten(0, 1), batch.next_latents.flatten(0, 1)
        a = scheduler.alphas_cumprod[t][:, None, None, None]
        noise = (latents - a.sqrt() * final) / (1 - a).sqrt()
        wanted = {"epsilon": noise, "sample": final, "v_prediction": scheduler.get_velocity(final, noise, t)}
        # at the first timestep the noise is a hundredth of the latents, and so has 2^7 of their roundings
        torch.testing.assert_close(target, wanted[prediction_type], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(latents, scheduler.add_noise(final, noise, t))
        seen.append(t)
    assert not torch.equal(*seen), "each inner epoch draws anew"
    assert len(torch.cat(seen).unique()) > 8, "of all timesteps, not of the sampled ones"


def test_regression_leaves_images_without_weight_out(make):
    trainer = make(objective="rwr", rwr_top_fraction=0.34, **ONE_UPDATE, **RANKS)
    pairs = []
    trainer.sd_pipeline.unet.register_forward_hook(
        lambda unet, inputs, output: pairs.append(len(output[0]) // 2) if unet.training else None
    )
    trainer.train(1)
    (update,) = metrics_of(trainer, "update")
    # two of six images with 5 timesteps each
    assert sum(pairs) == 10
    assert update["skipped"] == pytest.approx(4 / 6)
    assert update["loss"] > 0
    assert not {"approx_kl", "clipfrac", "ratio_drift"} & set(update)


# what all objectives do in a run

RUNS = {
    "ddpo_is": {"train_kl_weight": 0.1, "train_gradient_accumulation_steps": 1, "train_batch_size": 3},
    "ddpo_sf": {"train_kl_weight": 0.1},
    "rwr": {"rwr_beta": 1.0, "train_num_inner_epochs": 2},
    "ddpo_is with averages": {"ema_sampling": True, "ema_decay": 0.5},
}


def settings_of(run: str) -> dict:
    # the prompt is always the same, as `Prompts` does not save its generator's state
    return {"objective": run.split()[0], "prompts": lambda: ("a cat", {}), **ONE_UPDATE, **RANKS, **RUNS[run]}


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_has_the_same_bits(make, tmp_path, run):
    """The reference is the model before training also in a resumed run, whose weights are a checkpoint's."""
    whole = make(output_dir=tmp_path / "whole", **settings_of(run))
    whole.train(2)
    make(output_dir=tmp_path / "stopped", **settings_of(run)).train(1)
    resumed = make(output_dir=tmp_path / "stopped", resume_from=str(tmp_path / "stopped"), **settings_of(run))
    resumed.train()
    assert same_bits(trained_weights(whole), trained_weights(resumed))
    records = [[r["loss"] for r in metrics_of(trainer, "update")] for trainer in (whole, resumed)]
    assert records[0] == records[1]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_update_makes_good_samples_likelier(make, name):
    """By the objective's own measure: log-probs weighted by advantages, or the error at noised images of the best."""
    trainer = make(
        objective=name,
        train_learning_rate=1e-4,
        **ONE_UPDATE,
        **RANKS,
        **({"rwr_top_fraction": 0.34} if name == "rwr" else {}),
    )
    kept = []
    train_on = trainer._train_on

    def measured(trajectory, *arguments):
        kept.append(trajectory)
        return train_on(trajectory, *arguments)

    trainer._train_on = measured

    @torch.no_grad()
    def value() -> float:
        if name != "rwr":
            scored = trainer.ppo.score_again(kept[0])
            return float((kept[0].advantages[:, None] * scored.log_probs.double()).mean())
        torch.manual_seed(1)
        ((batch,),) = noised_batches(kept[0], trainer.sd_pipeline.scheduler, trainer.config)
        objective, total = trainer.ppo.objective, 0.0
        for i in range(5):
            embeds = torch.cat([batch.negative_prompt_embeds, batch.prompt_embeds])
            pairs = Pairs(
                batch.latents[:, i],
                batch.timesteps[:, i],
                batch.next_latents[:, i],
                batch.log_probs[:, i],
                batch.advantages,
                embeds,
            )
            output = trainer.policy.output(pairs.latents, pairs.timesteps, embeds)
            total -= float(objective.score(output, None, pairs, None).loss)
        return total

    before = trained_weights(trainer)
    trainer.train(1)
    after = value()
    with torch.no_grad():
        for parameter_name, parameter in trainer.sd_pipeline.unet.named_parameters():
            parameter.copy_(before[parameter_name])
    assert after > value()


# the reference


@pytest.mark.parametrize("use_lora", [False, True])
def test_kl_is_to_the_model_before_training(make, tmp_path, use_lora):
    """It begins at 0 and stays smaller with a larger weight; the reference stays what the model was."""
    divergences = []
    for weight in (1e-6, 1e4):
        trainer = make(
            use_lora=use_lora,
            train_kl_weight=weight,
            num_epochs=3,
            output_dir=tmp_path / f"{weight}",
            **ONE_UPDATE | {"train_num_inner_epochs": 2},
            **RANKS,
        )
        inputs = torch.randn(2, *trainer.policy.latent_shape), torch.tensor([1, 500])
        embeds = trainer.policy.negative_embeds.repeat(4, 1, 1)
        with torch.no_grad():
            before = trainer.policy.output(*inputs, embeds)
        trainer.train()
        updates = metrics_of(trainer, "update")
        assert updates[0]["reference_kl"] == 0
        assert all(update["skipped"] == 0 for update in updates), "the divergence has a gradient at every pair"
        divergences.append(updates[-1]["reference_kl"])
        assert torch.equal(trainer.ppo.objective.reference.output(*inputs, embeds), before)
        assert not torch.equal(trainer.policy.output(*inputs, embeds), before)
    assert divergences[0] > 2 * divergences[1] > 0


# sampling with the moving average


@pytest.mark.parametrize("kind", ["fp32", "bf16", "host", "rounding", "averages on the host in bf16"])
def test_computing_with_other_values(kind):
    """The network computes with the values, rounded, and with its own weights again afterwards."""
    network = nn.Linear(3, 2)
    exact = {"host": "host", "rounding": "none"}.get(kind, "device")
    dtype = torch.float32 if kind in ("fp32", "host") else torch.bfloat16
    weights = MasterWeights(list(network.parameters()), dtype, "cpu", exact)
    masters = [master.detach().clone() for master in weights.masters]
    values = [torch.randn_like(p, dtype=torch.float32) for p in weights.parameters]
    at = []
    for _ in range(2):
        with weights.computing():
            before = [p.detach().clone() for p in network.parameters()]
        with weights.computing_with(values), weights.computing():
            for parameter, value in zip(network.parameters(), values, strict=True):
                assert torch.equal(parameter.detach(), value.to(dtype))
            at.append([p.data_ptr() for p in network.parameters()])
        with weights.computing():
            assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))
        for value in values:
            value += 1
    assert at[0] == at[1]
    assert all(torch.equal(m, old) for m, old in zip(weights.masters, masters, strict=True))


def test_samples_are_of_the_averages(make):
    """Log-probs are those of the averaged policy; training begins from the weights, with ratios that are not 1."""
    trainer = make(ema_sampling=True, ema_decay=0.9, train_learning_rate=1e-2, **ONE_UPDATE, **RANKS)
    limits = drift_limits(trainer)
    kept, generate = [], trainer._generate_samples

    def watched(*arguments, **keywords):
        samples, batches = generate(*arguments, **keywords)
        with trainer.engine.averaged():
            scored = trainer.ppo.score_again(samples[0].with_advantages(torch.ones(6)))
            kept.append((samples[0].log_probs, scored.log_probs))
        return samples, batches

    trainer._generate_samples = watched
    trainer.train(2)
    for (sampled, scored), limit in zip(kept, limits, strict=True):
        # the log-probs of two calls with other numbers of rows differ by rounding
        torch.testing.assert_close(sampled, scored, rtol=0, atol=limit)
    first, second = metrics_of(trainer, "update")
    assert first["ratio_drift"] < limits[0]
    assert second["ratio_drift"] > 1e-3
    assert not trainer.run_log._warned_of_drift


# settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "ddpo_sf"}, "2 updates: set train_gradient_accumulation_steps=4"),
        ({"objective": "ddpo_sf", **ONE_UPDATE, "train_num_inner_epochs": 2}, "has 2 updates"),
        ({"objective": "ddpo_sf", **ONE_UPDATE, "ema_sampling": True, "ema_decay": 0.9}, "leave out ema_sampling"),
        ({"objective": "ddpo_sf", **ONE_UPDATE, "train_clip_unit": "step"}, "train_clip_unit is for"),
        ({"ema_sampling": True}, "set ema_decay"),
        ({"objective": "rwr", "per_prompt_stat_tracking": True}, "leave out per_prompt_stat_tracking"),
        ({"objective": "rwr", "train_advantages": "rank"}, "leave out per_prompt_stat_tracking and train_advantages"),
        ({"objective": "rwr", "sample_group_size": 2}, "set rwr_per_prompt"),
        ({"objective": "rwr", "step_credit": "equal"}, "leave out step_credit"),
        ({"objective": "rwr", "train_image_credit": "coca"}, "weighs whole images: use train_image_credit=.none."),
        ({"objective": "rwr", "train_pool_latents": 2}, "train_strongest_share and train_pool_latents"),
        ({"objective": "rwr", "train_strongest_share": 0.5}, "train_strongest_share"),
        ({"objective": "rwr", "train_skip_last_steps": 0.2}, "train_skip_last_steps"),
        ({"objective": "rwr", "train_kl_weight": 0.1}, "leave out train_kl_weight"),
        ({"objective": "rwr", "train_recompute_log_probs": True}, "train_recompute_log_probs"),
        ({"objective": "rwr", "rwr_top_fraction": 0.1, "rwr_beta": 1.0}, "leave out rwr_beta"),
        ({"rwr_beta": 1.0}, "are for objective='rwr'"),
        ({"rwr_per_prompt": True}, "are for objective='rwr'"),
        ({"train_kl_weight": 0.1, "zero": 2}, "train without ZeRO"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        DDPOConfig(**{**SETTINGS, **settings})


@pytest.mark.parametrize("settings", [{"objective": "rwr"}, {"train_kl_weight": 0.1}])
def test_an_own_loss_and_another_objective_are_refused(make, settings):
    """The override would train, and the setting would do nothing."""
    trainer = make(**settings)
    trainer.loss = lambda advantages, clip_range, ratio: (advantages * ratio).mean()
    with pytest.raises(ValueError, match="the override"):
        trainer.train(1)
