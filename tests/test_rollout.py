"""Sampling: merged batches, cached layers and rewards that run meanwhile do not change what is sampled."""

from __future__ import annotations

import asyncio
import contextvars
import decimal
import signal
import sqlite3
import threading
from collections.abc import Callable

import pytest
import torch
from compare_runs import same_bits, trained_weights
from example_unets import make_unet
from rounding import in_fp64
from tiny_run import Prompts, brightness
from torch.utils._python_dispatch import TorchDispatchMode

from ddpo_fast import DefaultDDPOStableDiffusionPipeline, sampler
from ddpo_fast.prompt_embeddings import ENCODED_AT_ONCE, PromptEmbeddings
from ddpo_fast.prompts import PromptGroups
from ddpo_fast.trajectory import training_batches
from ddpo_fast.unet import UNetCache, cache_problem


def rows_seen(trainer) -> list[int]:
    rows = []
    trainer.sd_pipeline.unet.register_forward_hook(lambda _module, _inputs, output: rows.append(len(output[0])))
    return rows


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_merged_batches_equal_separate_ones(make_trainer, tmp_path, guidance):
    samples, rows = [], []
    for merge in (1, 3):
        trainer = make_trainer(
            sample_merge_batches=merge, sample_guidance_scale=guidance, output_dir=str(tmp_path / f"{merge}")
        )
        in_fp64(trainer)
        seen = rows_seen(trainer)
        samples.append(trainer._generate_samples(4, 2))
        rows.append(seen)
    copies = 2 if guidance > 1 else 1
    # four batches of two images: one at a time, or three and then one
    assert rows == [[2 * copies] * 20, [6 * copies] * 5 + [2 * copies] * 5]
    pairs = zip(*(zip(*s, strict=True) for s in samples), strict=True)
    for (alone, (images, prompts, metadata)), (merged, others) in pairs:
        assert alone.prompts == merged.prompts == prompts == others[1]
        assert metadata == others[2]
        assert torch.equal(alone.trail[:, 0], merged.trail[:, 0]), "the same noise"
        # matrix products of other sizes round differently, by 1e-16, which each denoising step makes larger
        torch.testing.assert_close(merged.trail, alone.trail, rtol=0, atol=1e-11)
        torch.testing.assert_close(merged.log_probs, alone.log_probs, rtol=0, atol=1e-11)
        torch.testing.assert_close(others[0], images, rtol=0, atol=1e-11)


def test_merging_is_automatic(make_trainer, tmp_path):
    assert make_trainer().sizes.merged_batches == 3  # 24 rows: 3 batches of 4 images, with and without the prompt
    assert make_trainer(sample_merge_batches=7, output_dir=tmp_path / "set").sizes.merged_batches == 7


class NeedsTheNextBatch:
    """A reward whose first call returns only once the UNet is called for a later batch."""

    def __init__(self, expected_overlap: bool) -> None:
        self.scored_first = threading.Event()
        self.sampling_again = threading.Event()
        self.threads = set()
        self.expected_overlap = expected_overlap

    def __call__(self, images, prompts, metadata):
        self.threads.add(threading.current_thread().name)
        if self.expected_overlap and not self.scored_first.is_set():
            self.scored_first.set()
            assert self.sampling_again.wait(600), "nothing was sampled while the first batch was scored"
        return brightness(images, prompts, metadata)

    def watch(self, unet) -> None:
        def look(_module, _inputs) -> None:
            if self.scored_first.is_set():
                self.sampling_again.set()

        unet.register_forward_pre_hook(look)


@pytest.mark.parametrize("is_async", [False, True])
def test_rewards_run_while_the_next_batch_is_sampled(make_trainer, is_async):
    reward = NeedsTheNextBatch(expected_overlap=True)
    trainer = make_trainer(
        reward=reward, async_reward_computation=is_async, sample_merge_batches=1, sample_num_batches_per_epoch=4
    )
    reward.watch(trainer.sd_pipeline.unet)
    trainer.train(1)
    if is_async:
        assert all(name.startswith("reward") for name in reward.threads)
    else:
        assert reward.threads == {threading.current_thread().name}, "as TRL calls it"


def test_without_overlap_rewards_run_in_the_callers_thread(make_trainer):
    reward = NeedsTheNextBatch(expected_overlap=False)
    make_trainer(reward=reward, reward_overlap=False).train(1)
    assert reward.threads == {threading.current_thread().name}


def with_signal(images, prompts, metadata):
    signal.setitimer(signal.ITIMER_REAL, 100)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return brightness(images, prompts, metadata)


def with_event_loop() -> Callable:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)

    async def judge(image):
        return float(image.mean())

    def reward(images, prompts, metadata):
        assert asyncio.get_event_loop_policy().get_event_loop() is loop
        return [loop.run_until_complete(judge(image)) for image in images], {}

    return reward


def with_database() -> Callable:
    database = sqlite3.connect(":memory:")
    database.execute("create table seen (n int)")

    def reward(images, prompts, metadata):
        database.execute("insert into seen values (?)", (len(images),))
        return brightness(images, prompts, metadata)

    return reward


def with_state_of_its_thread() -> Callable:
    """A reward that depends on state of its thread: in another thread it gives wrong rewards without an error."""
    local, variable = threading.local(), contextvars.ContextVar("scale", default=float("nan"))
    local.offset = 1.0
    variable.set(2.0)

    def reward(images, prompts, metadata):
        with decimal.localcontext() as context:
            assert context.prec == 7
        return images.mean((1, 2, 3)) * variable.get() + local.offset, {}

    return reward


@pytest.mark.parametrize("make", [lambda: with_signal, with_event_loop, with_database, with_state_of_its_thread])
def test_rewards_and_prompts_are_called_in_the_thread_that_trains(make_trainer, make):
    """By default, as in TRL: users set up signals, event loops, databases and thread-local state in that thread."""
    prompts, threads = Prompts(), set()

    def draw():
        threads.add(threading.current_thread())
        return prompts()

    with decimal.localcontext() as context:
        context.prec = 7
        make_trainer(reward=make(), prompts=draw, sample_merge_batches=1).train()
    assert threads == {threading.current_thread()}


def test_an_error_that_is_due_to_a_worker_thread_names_the_option(make_trainer):
    def reward(images, prompts, metadata):
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return brightness(images, prompts, metadata)

    with pytest.raises(RuntimeError, match=r"main thread.*: set async_reward_computation=False"):
        make_trainer(reward=reward, async_reward_computation=True).train()


def test_sampling_ends_when_a_reward_fails(make_trainer):
    """Sampling stops at its next denoising step, so that the network is not in use when the error is caught."""
    steps = []

    def reward(images, prompts, metadata):
        raise KeyboardInterrupt

    trainer = make_trainer(reward=reward, sample_merge_batches=1, sample_num_batches_per_epoch=50)
    trainer.sd_pipeline.unet.register_forward_pre_hook(lambda *_: steps.append(1))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    taken = len(steps)
    assert taken < 50 * 5
    assert not [thread for thread in threading.enumerate() if thread.name == "sampling"]
    trainer.reward_fn = brightness
    trainer.train(1)
    assert len(steps) > taken + 50 * 5


def test_an_error_of_sampling_is_raised_in_the_calling_thread(make_trainer, monkeypatch):
    trainer = make_trainer(sample_merge_batches=1)
    vae, decoded = trainer.sd_pipeline.vae, []
    decode = vae.decode

    def fails(*arguments, **options):
        decoded.append(1)
        if len(decoded) == 2:
            raise torch.OutOfMemoryError("no room")
        return decode(*arguments, **options)

    monkeypatch.setattr(vae, "decode", fails)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        trainer.train()


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_images_have_one_dtype_everywhere(make_trainer, precision):
    """Rewards and hooks convert images to NumPy arrays, which cannot be bf16."""
    seen = []

    def look(images):
        seen.append(images.dtype)
        assert images.numpy().min() >= 0
        assert images.numpy().max() <= 1

    def reward(images, prompts, metadata):
        look(images)
        return images.numpy().mean((1, 2, 3)), {}

    def hook(batches, step, tracker):
        for images, *_ in batches:
            look(images)

    trainer = make_trainer(reward=reward, hook=hook, mixed_precision=precision)
    look(trainer.evaluate(("a cat",), ({},))[0])
    trainer.train(1)
    look(trainer.sd_pipeline(prompt="a cat", num_inference_steps=2, output_type="pt").images)
    assert set(seen) == {torch.float32}


def test_images_of_a_users_pipeline_have_that_dtype_too(make_trainer, model_dir):
    class Own(DefaultDDPOStableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            output = super().__call__(*args, **kwargs)
            output.images = output.images.bfloat16().requires_grad_()
            return output

    def reward(images, prompts, metadata):
        return images.numpy().mean((1, 2, 3)), {}

    trainer = make_trainer(reward=reward, pipeline=Own(model_dir, use_lora=False))
    trainer.evaluate(("a cat",), ({},))
    trainer.train(1)


def test_a_reward_that_changes_its_images_does_not_change_the_run(make_trainer, tmp_path):
    shown, ends = [], []

    def spoils(images, prompts, metadata):
        rewards = brightness(images, prompts, metadata)
        images.fill_(7.0)
        return rewards

    for reward in (brightness, spoils):
        trainer = make_trainer(
            reward=reward,
            hook=lambda batches, *_: shown.append(torch.cat([batch[0] for batch in batches])),
            output_dir=str(tmp_path / reward.__name__),
        )
        trainer.train(1)
        shown.append(trainer.evaluate(("a cat",), ({},))[0])
        ends.append(trained_weights(trainer))
    assert same_bits(*ends)
    assert torch.equal(shown[0], shown[2])
    assert torch.equal(shown[1], shown[3])


def test_a_reward_that_draws_random_numbers_does_not_change_the_run(make_trainer, tmp_path):
    """All of an epoch's noise is drawn before the first image is scored."""

    def draws(images, prompts, metadata):
        return torch.rand(len(images)), {}

    ends = []
    for overlap in (False, True):
        trainer = make_trainer(
            reward=draws, reward_overlap=overlap, sample_merge_batches=1, output_dir=str(tmp_path / f"{overlap}")
        )
        trainer.train()
        ends.append(trained_weights(trainer))
    assert same_bits(*ends)


def test_a_reward_that_fails_stops_the_epoch(make_trainer):
    calls = []

    def fails(images, prompts, metadata):
        calls.append(len(images))
        raise KeyError("no such animal")

    trainer = make_trainer(reward=fails, sample_merge_batches=1, sample_num_batches_per_epoch=6)
    with pytest.raises(RuntimeError, match="reward function raised KeyError: 'no such animal'"):
        trainer.train()
    assert len(calls) < 6, "batches after a failure are not scored"


def test_cached_layers_give_the_same_samples(make_trainer, tmp_path):
    samples = []
    for cached in (False, True):
        trainer = make_trainer(sample_cache=cached, sample_merge_batches=2, output_dir=str(tmp_path / f"{cached}"))
        in_fp64(trainer)
        unet = trainer.sd_pipeline.unet
        before = {name: set(vars(module)) for name, module in unet.named_modules()}
        samples.append(trainer._generate_samples(2, 4)[0])
        assert {name: set(vars(module)) for name, module in unet.named_modules()} == before, "the layers are back"
    for plain, cached in zip(*samples, strict=True):
        # a cached layer computes the rows of all steps in one call, which rounds differently as above
        torch.testing.assert_close(cached.trail, plain.trail, rtol=0, atol=1e-11)
        torch.testing.assert_close(cached.log_probs, plain.log_probs, rtol=0, atol=1e-11)


def test_a_cache_computes_its_layers_once_per_rollout(make_trainer):
    unet = make_trainer().sd_pipeline.unet.double()
    cache, embeds = UNetCache(unet), torch.randn(4, 32, 32, dtype=torch.float64)
    timesteps = torch.tensor([801, 601, 401])
    rows = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = [unet(rows, t, embeds).sample for t in timesteps]
        cache.fill(embeds, timesteps)
        cached = [cache.projections[0], unet.time_embedding.linear_1, cache.blocks[0].time_emb_proj]
        for layer in cached:
            layer.weight.zero_()  # computing the layer again would give another output
        with cache.in_use():
            for i, t in enumerate(timesteps):
                cache.at(i)
                torch.testing.assert_close(unet(rows, t, embeds).sample, expected[i], rtol=0, atol=1e-11)
        assert (unet(rows, timesteps[0], embeds).sample - expected[0]).abs().max() > 1e-3


def test_what_cannot_be_cached_says_why():
    assert cache_problem(make_unet("sd15")) == ""
    assert "add_embedding" in cache_problem(make_unet("sdxl"))
    assert "UNet2DConditionModel" in cache_problem(torch.nn.Linear(1, 1))
    unet = make_unet("sd15")
    for kind in ("down_block_types", "up_block_types"):
        blocks = [name.replace("CrossAttn", "SimpleCrossAttn") for name in unet.config[kind]]
        unet.register_to_config(**{kind: blocks})
    mid = "UNetMidBlock2DSimpleCrossAttn"
    assert "AttnAddedKV" in cache_problem(type(unet).from_config(unet.config, mid_block_type=mid))


def test_a_prompts_embedding_does_not_depend_on_the_other_prompts(make_trainer):
    trainer = make_trainer()
    pipeline, device = trainer.sd_pipeline, trainer.accelerator.device

    def fresh():
        return PromptEmbeddings(pipeline.family, device, remembers=True)

    names = [f"a cat number {i}" for i in range(ENCODED_AT_ONCE + 3)]
    alone, together = fresh(), fresh()
    ids, embeddings = together([*names, names[0]])
    assert torch.equal(embeddings[0], embeddings[-1])
    for i, name in enumerate(names):
        one_id, one = alone([name])
        assert torch.equal(one[0], embeddings[i])
        assert torch.equal(one_id[0], ids[i])


def test_embeddings_of_a_trained_text_encoder_are_not_cached(make_trainer):
    trainer = make_trainer()
    pipeline = trainer.sd_pipeline
    pipeline.text_encoder.requires_grad_(True)
    embed = PromptEmbeddings(pipeline.family, trainer.accelerator.device, remembers=True)
    before = embed(["a cat"])[1]
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).add_(1.0)
    assert not torch.equal(embed(["a cat"])[1], before)


class Waits(TorchDispatchMode):
    """Notes ops whose result the host reads, for which it would wait for the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(self.NAMES):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_host_never_waits_inside_sampling_and_training(make_trainer, monkeypatch, use_lora):
    trainer = make_trainer(use_lora=use_lora, prompts=Prompts(), train_micro_batch_size=3, sample_merge_batches=2)
    trainer.train(1)  # computes the step table and caches embeddings
    draws = [trainer.rollout.draw(PromptGroups(trainer.prompt_fn, 1), 4) for _ in range(2)]
    with Waits() as sampling:
        samples = [trajectory for trajectory, _ in trainer.rollout.sample(draws)]
    assert sampling.seen == []
    trajectory = samples[0].with_advantages(torch.tensor([1.0, -1.0, 0.5, -0.5]))
    ((batch,),) = training_batches(trajectory, 4, 1)
    trainer.sd_pipeline.unet.train()
    monkeypatch.setattr(trainer.engine, "step", dict)
    # the host reads an update's metrics only once all updates of an inner epoch are queued
    waits: list[list[str]] = []
    write = trainer.run_log.log_updates
    monkeypatch.setattr(trainer.run_log, "log_updates", lambda *args: waits.append(training.seen[:]) or write(*args))
    with Waits() as training:
        trainer._train_batched_samples(0, 0, 0, [batch])
    assert waits == [[]]


def test_images_are_decoded_a_few_at_a_time(make_trainer, monkeypatch):
    pipeline = make_trainer().sd_pipeline
    pipe, family = pipeline.sd_pipeline, pipeline.family
    pipe.vae.double()
    latents = torch.randn(5, 4, 8, 8, dtype=torch.float64)
    whole = sampler.decode(family, latents, "pt")
    monkeypatch.setattr(sampler, "DECODED_AT_ONCE", 2 * 8 * 8)
    sizes = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda part, **kwargs: sizes.append(len(part)) or decode(part, **kwargs))
    torch.testing.assert_close(sampler.decode(family, latents, "pt"), whole, rtol=0, atol=1e-11)
    assert sizes == [2, 2, 1]
