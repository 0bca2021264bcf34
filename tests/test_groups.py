"""Groups of images of one prompt: how they are drawn, compared, and drawn again where their rewards have no spread."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compare_runs import metrics_of
from tiny_run import Prompts, brightness

from ddpo_fast import DefaultDDPOStableDiffusionPipeline
from ddpo_fast.advantages import group_advantages
from ddpo_fast.groups import ScoredImages
from ddpo_fast.prompts import PromptGroups
from ddpo_fast.trajectory import Trajectory

# eight images in two sampling batches, denoised with two steps
FEW_STEPS = {"sample_num_steps": 2, "num_epochs": 1}


class Numbered:
    """Prompts that are told apart, with metadata; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> tuple[str, dict]:
        self.calls += 1
        return f"cat {self.calls}", {"number": self.calls}


class OwnCall(DefaultDDPOStableDiffusionPipeline):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class TakesNoLatents(DefaultDDPOStableDiffusionPipeline):
    def __call__(self, prompt_embeds, negative_prompt_embeds, num_inference_steps, guidance_scale, eta, output_type):
        raise NotImplementedError


def keep_trained(trainer) -> list[Trajectory]:
    """A list that gets the trajectories that the trainer trains on."""
    kept, train_on = [], trainer._train_on
    trainer._train_on = lambda trajectory, *args: kept.append(trajectory) or train_on(trajectory, *args)
    return kept


def test_a_prompt_is_drawn_once_for_each_group():
    draw = Numbered()
    groups = PromptGroups(draw, 3)
    found = [groups.draw(2) for _ in range(3)]
    assert [prompt for prompts, _ in found for prompt in prompts] == ["cat 1"] * 3 + ["cat 2"] * 3
    assert [each["number"] for _, metadata in found for each in metadata] == [1, 1, 1, 2, 2, 2]
    assert draw.calls == 2


@pytest.mark.parametrize("own_call", [False, True])
@pytest.mark.parametrize("noise", ["own", "shared"])
def test_groups_span_sampling_batches(make_trainer, model_dir, noise, own_call):
    pipeline = OwnCall(model_dir) if own_call else None
    prompts = Numbered()
    trainer = make_trainer(
        prompts=prompts, pipeline=pipeline, sample_group_size=4, sample_batch_size=2, sample_group_noise=noise,
        sample_num_batches_per_epoch=4, sample_merge_batches=3, **FEW_STEPS
    )  # fmt: skip
    samples, batches = trainer._generate_samples(4, 2)
    assert [prompt for _, found, _ in batches for prompt in found] == ["cat 1"] * 4 + ["cat 2"] * 4
    assert [each["number"] for *_, metadata in batches for each in metadata] == [1] * 4 + [2] * 4
    trail = torch.cat([sample.trail for sample in samples])
    first, last = trail[:, 0], trail[:, -1]
    for group in (slice(0, 4), slice(4, 8)):
        assert (first[group] == first[group][:1]).all() == (noise == "shared")
    assert not torch.equal(first[0], first[4])
    assert all(not torch.equal(last[i], last[j]) for i in range(8) for j in range(i)), "the steps' noises differ"


def test_a_pipeline_that_takes_no_latents_is_refused(make_trainer, model_dir):
    with pytest.raises(ValueError, match="takes no latents to start from"):
        make_trainer(pipeline=TakesNoLatents(model_dir), sample_group_size=2, sample_group_noise="shared")


@pytest.mark.parametrize("settings", [{}, {"async_reward_computation": True}, {"reward_overlap": False}])
def test_advantages_are_within_the_group(make_trainer, settings):
    def reward(images, prompts, metadata):
        # the images of the first prompt are all as good
        values = images.mean((1, 2, 3))
        return torch.where(torch.tensor([prompt == "cat 1" for prompt in prompts]), 0.1, values), {}

    kept_rewards = []
    trainer = make_trainer(
        reward=reward, prompts=Numbered(), sample_group_size=4, **FEW_STEPS, **settings,
        hook=lambda batches, *_: kept_rewards.extend(float(r) for batch in batches for r in batch[3]),
    )  # fmt: skip
    kept = keep_trained(trainer)
    trainer.train()
    (trajectory,) = kept
    rewards = np.array(kept_rewards, dtype=np.float32)
    np.testing.assert_array_equal(trajectory.advantages.numpy(), group_advantages(rewards, 4))
    assert trajectory.has_advantage.tolist() == [False] * 4 + [True] * 4
    skipped = max(update["skipped"] for update in metrics_of(trainer, "update"))
    assert skipped > 0, "pairs of images without an advantage are left out"
    (epoch,) = metrics_of(trainer, "epoch")
    assert epoch["images_scored"] == epoch["images"] == 8


def scored(first: int, rewards: list[float], batch_size: int = 2) -> ScoredImages:
    """Images numbered from `first`, with these rewards."""
    numbers = torch.arange(first, first + len(rewards))
    names = [f"image {number}" for number in numbers.tolist()]
    column = numbers[:, None].float()
    trajectory = Trajectory(
        prompts=tuple(names), prompt_ids=numbers[:, None], prompt_embeds=column[:, None],
        negative_prompt_embeds=torch.zeros(1, 1, 1).expand(len(names), 1, 1), timesteps=numbers[:, None],
        trail=column.reshape(-1, 1, 1, 1, 1).expand(-1, 2, 1, 1, 1), log_probs=column, credit=column,
    )  # fmt: skip
    batches = [
        [
            column[at : at + batch_size], tuple(names[at : at + batch_size]), tuple(names[at : at + batch_size]),
            torch.tensor(rewards[at : at + batch_size]),
            {"each": list(numbers[at : at + batch_size].tolist()), "all": "one value"},
        ]
        for at in range(0, len(names), batch_size)
    ]  # fmt: skip
    return ScoredImages(trajectory, batches)


def test_groups_without_spread_are_replaced():
    ours = scored(0, [1, 1, 1, 2, 2, 3, 5, 5, 5], batch_size=3)
    # the second group has no spread, and the last image is of a group that was cut
    others = scored(100, [0, 1, 2, 3, 3, 3, 7, 8, 9, 6], batch_size=2)
    assert ours.has_spread(3).tolist() == [False, True, False]
    assert others.has_spread(3).tolist() == [True, False, True]
    before = [[*batch] for batch in ours.batches]
    found = ours.with_groups_of(others, 3)
    expected = [100, 101, 102, 3, 4, 5, 106, 107, 108]
    names = [f"image {number}" for number in expected]
    assert list(found.trajectory.prompts) == names
    for name in ("prompt_ids", "prompt_embeds", "timesteps", "log_probs", "credit"):
        assert found.trajectory[name].flatten().tolist() == expected, name
    assert found.trajectory.trail[:, 1].flatten().tolist() == expected
    assert [number for batch in found.batches for number in batch[0].flatten().tolist()] == expected
    assert [name for batch in found.batches for name in batch[1]] == names
    assert [name for batch in found.batches for name in batch[2]] == names
    assert [reward for batch in found.batches for reward in batch[3].tolist()] == [0, 1, 2, 2, 2, 3, 7, 8, 9]
    assert [number for batch in found.batches for number in batch[4]["each"]] == expected
    assert all(batch[4]["all"] == "one value" for batch in found.batches)
    assert [[*map(str, batch)] for batch in ours.batches] == [[*map(str, batch)] for batch in before], "copies"


def test_what_has_no_replacement_stays():
    ours, others = scored(0, [1, 1, 2, 2]), scored(100, [3, 3, 5, 6])
    assert list(ours.with_groups_of(others, 2).trajectory.prompts) == ["image 102", "image 103", "image 2", "image 3"]
    assert ours.with_groups_of(scored(100, [3, 3]), 2) is ours


class FlatAtFirst:
    """A reward without spread for the prompts up to a number, and the images' brightness for the others."""

    def __init__(self, flat: int) -> None:
        self.flat, self.images = flat, 0

    def __call__(self, images, prompts, metadata):
        self.images += len(images)
        numbers = torch.tensor([each["number"] for each in metadata])
        return torch.where(numbers <= self.flat, 0.1, images.mean((1, 2, 3))), {"seen": numbers.tolist()}


@pytest.mark.parametrize(("flat", "redraws", "images"), [(0, 2, 8), (1, 2, 12), (3, 2, 20), (99, 2, 24)])
def test_flat_groups_are_drawn_again(make_trainer, flat, redraws, images):
    hooked = []
    reward = FlatAtFirst(flat)
    trainer = make_trainer(
        reward=reward, prompts=Numbered(), sample_group_size=4, sample_redraws=redraws, **FEW_STEPS,
        hook=lambda batches, *_: hooked.extend(batches),
    )  # fmt: skip
    kept = keep_trained(trainer)
    trainer.train()
    (trajectory,) = kept
    assert len(trajectory.prompts) == 8
    assert [prompt for _, prompts, *_ in hooked for prompt in prompts] == list(trajectory.prompts)
    assert [f"cat {n}" for *_, found in hooked for n in found["seen"]] == list(trajectory.prompts)
    # what the hook got are the images of the latents that are trained on
    decoded = trainer.sd_pipeline.vae.decode(trajectory.trail[:, -1] / trainer.sd_pipeline.vae.config.scaling_factor)
    shown = torch.cat([found[0] for found in hooked])
    torch.testing.assert_close(shown, (decoded.sample / 2 + 0.5).clamp(0, 1).detach(), rtol=0, atol=1e-4)
    (epoch,) = metrics_of(trainer, "epoch")
    assert epoch["images_scored"] == reward.images == images
    assert epoch["images"] == 8
    assert epoch["images_per_s"] == pytest.approx(images / sum(epoch[n] for n in ("sample_s", "reward_s", "train_s")))
    assert (trajectory.advantages != 0).all() == (flat < 99)


def test_further_groups_have_new_noise(make_trainer):
    """The reward's random state is restored before each draw, so that a redraw does not repeat the first noise."""
    trails = []
    trainer = make_trainer(
        reward=FlatAtFirst(99), prompts=Numbered(), sample_group_size=4, sample_redraws=1, **FEW_STEPS
    )
    generate = trainer._generate_samples

    def keep(*args):
        samples, batches = generate(*args)
        trails.append(torch.cat([sample.trail for sample in samples]))
        return samples, batches

    trainer._generate_samples = keep
    trainer.train()
    first, again = trails
    assert not torch.equal(first[:, 0], again[:, 0])


def test_groups_change_nothing_at_size_one(make_trainer, tmp_path):
    trails = []
    for size in (1, 2):
        trainer = make_trainer(
            prompts=Prompts(), reward=brightness, sample_group_size=size, output_dir=tmp_path / f"{size}", **FEW_STEPS
        )
        trails.append(torch.cat([sample.trail for sample in trainer._generate_samples(2, 4)[0]]))
    # the same noise, whatever the groups
    assert torch.equal(trails[0][:, 0], trails[1][:, 0])
