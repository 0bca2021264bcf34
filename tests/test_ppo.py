"""Updates: pairs without a gradient are left out and nothing changes by it; the fast path trains like the plain one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rounding import RUNS_APART_IN_FP64, drift_limits, in_fp64
from tiny_run import brightness

from ddpo_fast.tiny_sd import MODEL
from ddpo_fast.trajectory import TrainingBatch

PLAIN = {
    "train_micro_batch_size": 2,
    "sample_merge_batches": 1,
    "sample_cache": False,
    "reward_overlap": False,
    "train_skip_dead_pairs": False,
    "fuse_unet": False,
}
GOLDEN = Path(__file__).with_name("golden_losses.json")


def trained(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.sd_pipeline.unet.named_parameters() if p.requires_grad}


def updates_of(trainer) -> list[dict]:
    return [record for record in trainer.run_log.metrics.read() if record["kind"] == "update"]


def example(trainer, advantages: list[float], shift: float) -> dict:
    """A training batch in fp64 with ratios on both sides of 1, a clip range or more away from it."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count, width = len(advantages), trainer.neg_prompt_embed.shape[-1]
    batch = {
        "prompt_embeds": randn(count, 32, width),
        "negative_prompt_embeds": randn(count, 32, width),
        "timesteps": torch.tensor([801, 601, 401, 201, 1]).expand(count, -1),
        "latents": randn(count, 5, 4, 8, 8),
        "next_latents": randn(count, 5, 4, 8, 8),
        "log_probs": torch.zeros(count, 5, dtype=torch.float64),
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "has_advantage": torch.tensor(advantages) != 0,
    }
    trainer.sd_pipeline.scheduler.set_timesteps(5)
    embeds = torch.cat([batch["negative_prompt_embeds"], batch["prompt_embeds"]])
    with torch.no_grad():
        for j in range(5):
            score = trainer.policy.log_prob(
                batch["latents"][:, j], batch["timesteps"][:, j], batch["next_latents"][:, j], embeds
            )
            batch["log_probs"][:, j] = score - shift * (-1) ** (torch.arange(count) + j)
    return batch


def update(trainer, batch, scores_first):
    """One update, after an epoch in which all pairs or none had no gradient."""
    trainer.ppo.remember([float(scores_first)])
    trainer.ppo.begin_epoch()
    return trainer.ppo.update([TrainingBatch.of(batch)], 0, None)


@pytest.mark.parametrize("looks_first", [False, True])
def test_dead_pairs_are_left_out_and_the_gradient_stays(make_trainer, tmp_path, looks_first):
    """Two of six images have no advantage, and of the others every second pair is clipped."""
    found, rows = {}, {}
    for skips in (False, True):
        trainer = make_trainer(
            train_skip_dead_pairs=skips, train_micro_batch_size=4, output_dir=str(tmp_path / f"{skips}")
        )
        trainer.sd_pipeline.unet.double()
        batch = example(trainer, [1.0, 0.0, -0.5, 2.0, 0.0, -1.0], shift=1e-2)
        seen = rows[skips] = {"with": 0, "without": 0}

        def count(_module, inputs, seen=seen):
            seen["with" if torch.is_grad_enabled() else "without"] += len(inputs[0]) // 2

        trainer.sd_pipeline.unet.register_forward_pre_hook(count)
        trainer.engine.step = dict
        metrics = update(trainer, batch, skips and looks_first)
        gradient = torch.cat([p.grad.flatten() for p in trainer.engine.parameters])
        found[skips] = gradient, {name: float(value) for name, value in metrics.items()}
    (every, all_metrics), (some, metrics) = found[False], found[True]
    assert (some - every).norm() < 1e-12 * every.norm()
    assert metrics["loss"] == pytest.approx(all_metrics["loss"], rel=1e-6)
    assert rows[False] == {"with": 30, "without": 0}
    assert rows[True] == ({"with": 10, "without": 20} if looks_first else {"with": 20, "without": 0})
    assert metrics["skipped"] == pytest.approx(20 / 30 if looks_first else 10 / 30)
    assert metrics["zero_gradient"] == pytest.approx(0.5), "of the pairs that have an advantage"


@pytest.mark.parametrize("looks_first", [False, True])
def test_remainders_have_few_sizes_and_the_update_stays(make_trainer, tmp_path, looks_first):
    """Of 30 pairs 20 have an advantage and 10 a gradient: calls of 7 leave 6 and 3, which take 7 and 4 rows."""
    found, sizes = [], []
    for pads in (False, True):
        trainer = make_trainer(train_micro_batch_size=7, output_dir=str(tmp_path / f"{pads}"))
        trainer.sd_pipeline.unet.double()
        trainer.ppo.pads_last_call = pads
        batch = example(trainer, [1.0, 0.0, -0.5, 2.0, 0.0, -1.0], shift=1e-2)
        seen: list[int] = []
        count = lambda _module, inputs, seen=seen: seen.append(len(inputs[0]) // 2)  # noqa: E731
        trainer.sd_pipeline.unet.register_forward_pre_hook(count)
        trainer.engine.step = dict
        metrics = {name: float(value) for name, value in update(trainer, batch, looks_first).items()}
        found.append((torch.cat([p.grad.flatten() for p in trainer.engine.parameters]), metrics))
        sizes.append(seen)
    (every, all_metrics), (filled, metrics) = found
    # zeros are added to sums in fp64
    assert (filled - every).norm() < 1e-12 * every.norm()
    assert metrics == pytest.approx(all_metrics, rel=1e-6)
    assert sizes == ([[7, 7, 6, 7, 3], [7, 7, 7, 7, 4]] if looks_first else [[7, 7, 6], [7, 7, 7]])


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_an_epoch_without_any_advantage_trains_on_zero(make_trainer, precision):
    """Adam's weight decay still acts, as it does in TRL, and no UNet is called."""
    trainer = make_trainer(
        reward=lambda images, *_: (torch.ones(len(images)), {}),
        train_adam_weight_decay=0.1,
        mixed_precision=precision,
        **PLAIN | {"train_skip_dead_pairs": True},
    )
    before = trained(trainer)
    rows = []
    trainer.sd_pipeline.unet.register_forward_pre_hook(lambda *_: rows.append(torch.is_grad_enabled()))
    trainer.train(1)
    assert not any(rows)
    assert [u["skipped"] for u in updates_of(trainer)] == [1.0, 1.0]
    # processes add up their metrics one by one: those without a live pair must have the same
    assert {"loss", "approx_kl", "clipfrac", "zero_gradient", "ratio_drift"} <= set(updates_of(trainer)[0])
    for name, after in trained(trainer).items():
        torch.testing.assert_close(after, before[name] * (1 - 1e-3 * 0.1) ** 2)


def test_looking_first_begins_when_many_pairs_were_dead(make_trainer):
    trainer = make_trainer(num_epochs=2)
    trainer.ppo.remember([0.1, 0.9])
    looked = []
    scores_first = trainer.ppo._scores_first
    trainer.ppo._scores_first = lambda number: looked.append(scores_first(number)) or looked[-1]
    trainer.step(0, 0)
    assert looked == [False, True]
    assert trainer.ppo.zero_gradient_shares == [u["zero_gradient"] for u in updates_of(trainer)]


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("inner_epochs", [1, 2])
def test_the_fast_path_trains_to_the_weights_of_the_plain_one(make_trainer, tmp_path, use_lora, inner_epochs):
    """Sums in another order, and nothing else."""
    ends = []
    for name, settings in (("plain", PLAIN), ("fast", {})):
        trainer = make_trainer(
            use_lora=use_lora,
            train_num_inner_epochs=inner_epochs,
            train_timestep_fraction=0.6,
            output_dir=str(tmp_path / name),
            **settings,
        )
        in_fp64(trainer)
        before = trained(trainer)
        trainer.train()
        ends.append(trained(trainer))
    moved = sum((ends[0][n] - before[n]).square().sum() for n in before) ** 0.5
    apart = sum((ends[0][n] - ends[1][n]).square().sum() for n in before) ** 0.5
    assert moved > 0
    assert apart < RUNS_APART_IN_FP64 * moved


BUNDLED = {
    "model": str(MODEL),
    "reward": brightness,  # a JPEG has whole bytes, which one rounding may change
    "num_epochs": 2,
    "sample_num_steps": 4,
    "train_learning_rate": 1e-4,
    "train_clip_range": 5e-3,
}


# guidance makes the rounding of two outputs seven times as large, too large in the halves to show anything else
@pytest.mark.parametrize(("precision", "guidance"), [("no", 5.0), ("fp16", 1.0), ("bf16", 1.0)])
def test_ratio_drift_of_the_bundled_model(make_trainer, precision, guidance):
    few = {"num_epochs": 1, "sample_num_steps": 2, "sample_batch_size": 2}
    trainer = make_trainer(**BUNDLED | few | {"mixed_precision": precision, "sample_guidance_scale": guidance})
    limits = drift_limits(trainer)
    trainer.train()
    drift = updates_of(trainer)[0]["ratio_drift"]
    assert drift <= limits[0]
    print(f"ratio drift of the bundled model in {precision}: {drift:.1e} of {limits[0]:.1e}")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_golden_losses(make_trainer, kind):
    """The bundled model's losses, gradient norms and rewards of two epochs, as they were committed.

    Another processor sums in another order: 1e-5 of a gradient's norm, which is a sum of pairs of both signs, and a
    hundred times less than the first epoch's bound. The second epoch's weights are 0.2 % of the way apart, as Adam's
    first steps are signs (see rounding.py), and its samples carry that on.
    """
    trainer = make_trainer(use_lora=kind == "lora", **BUNDLED)
    trainer.train()
    records = trainer.run_log.metrics.read()
    names = ("loss", "approx_kl", "grad_norm", "reward_mean")
    found = [{name: record[name] for name in names if name in record} for record in records]
    golden = json.loads(GOLDEN.read_text())[kind]
    assert len(found) == len(golden)
    for record, mine, kept in zip(records, found, golden, strict=True):
        assert mine == pytest.approx(kept, rel=(1e-3, 1e-2)[record["epoch"]], abs=1e-4)
