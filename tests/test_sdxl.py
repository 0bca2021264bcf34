"""Stable Diffusion XL is called, sampled, trained and saved as plain diffusers' pipeline has it."""

from __future__ import annotations

import diffusers
import pytest
import torch
from compare_runs import metrics_of, same_bits, trained_weights
from rounding import drift_limits, in_fp64

from ddpo_fast import DefaultDDPOStableDiffusionPipeline, cli, ops

STEPS = 3


@pytest.fixture(scope="module")
def folder(tiny_model) -> str:
    return tiny_model("sdxl")


@pytest.fixture(scope="module")
def pipeline(folder) -> DefaultDDPOStableDiffusionPipeline:
    return DefaultDDPOStableDiffusionPipeline(folder, use_lora=False)


@pytest.fixture(scope="module")
def plain(folder, pipeline):
    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, scheduler=pipeline.scheduler)
    plain.set_progress_bar_config(disable=True)
    return plain


def calls_of(unet, run) -> list[dict[str, torch.Tensor]]:
    """What a run calls the UNet with."""
    calls = []

    def see(module, arguments, keywords):
        added = keywords["added_cond_kwargs"]
        calls.append(
            {
                "latents": arguments[0],
                "timestep": arguments[1],
                "tokens": keywords["encoder_hidden_states"],
                "pooled": added["text_embeds"],
                "time_ids": added["time_ids"],
            }
        )

    handle = unet.register_forward_pre_hook(see, with_kwargs=True)
    run()
    handle.remove()
    return calls


@pytest.mark.parametrize(
    ("guidance_scale", "negative"), [(1.0, None), (5.0, None), (5.0, ""), (5.0, "a blurry drawing")]
)
@pytest.mark.parametrize("size", [(16, 16), (24, 8)])
def test_inputs_and_images_are_those_of_plain_diffusers(pipeline, plain, guidance_scale, negative, size):
    """The first call's inputs and all conditions to the bit; images up to rounding of the steps."""
    images = []

    def draw(drawn_by, eta):
        drawn = drawn_by(
            prompt=["a cat", "a red circle"],
            negative_prompt=None if negative is None else [negative] * 2,
            height=size[0],
            width=size[1],
            guidance_scale=guidance_scale,
            num_inference_steps=STEPS,
            eta=eta,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        )
        images.append(drawn.images)

    ours = calls_of(pipeline.unet, lambda: draw(pipeline, 1.0))
    theirs = calls_of(plain.unet, lambda: draw(plain, 1.0))
    assert len(ours) == len(theirs) == STEPS
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for name, value in other.items():
            if name == "latents" and step:
                # three steps of latents near 1 in fp32
                torch.testing.assert_close(one[name], value, rtol=0, atol=1e-5)
            else:
                assert torch.equal(one[name], value), name
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)
    assert images[0].shape == (2, 3, *size)


@pytest.mark.parametrize("negative", ["", "a blurry drawing"])
def test_a_run_encodes_prompts_as_its_samples_do(pipeline, plain, make_trainer, folder, negative):
    """A run without a negative prompt has what plain diffusers leads away from without one: zeros."""
    trainer = make_trainer(pipeline=DefaultDDPOStableDiffusionPipeline(folder), negative_prompts=negative)
    family = trainer.policy.family
    ids, embeds = trainer.policy.embed_prompts(["a cat"])
    tokens, no, pooled, no_pooled = plain.encode_prompt("a cat", negative_prompt=negative or None)
    seen = calls_of(
        family.denoiser,
        lambda: trainer.policy.output(
            torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.cat([trainer.policy.negative_embeds, embeds])
        ),
    )[0]
    # the encoders are called with another number of rows: a few roundings of values near 1
    torch.testing.assert_close(seen["tokens"], torch.cat([no, tokens]), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen["pooled"], torch.cat([no_pooled, pooled]), rtol=0, atol=1e-5)
    assert bool((no == 0).all()) == (negative == "")
    assert torch.equal(seen["time_ids"], torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2))
    assert torch.equal(ids, plain.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids)


RUN = {
    "prompts": lambda: ("a cat", {}),
    "num_epochs": 1,
    "sample_num_steps": 2,
    "sample_batch_size": 2,
    "sample_num_batches_per_epoch": 1,
    "train_batch_size": 2,
    "train_gradient_accumulation_steps": 1,
    "train_micro_batch_size": 3,
    "height": 24,
    "width": 8,
}


def plain_call(unet, family, latents, timesteps, embeds):
    """The UNet called as plain diffusers calls it, for embeddings whose last row begins with the pooled one."""
    pooled = embeds[:, -1, : family.pipe.text_encoder_2.config.projection_dim]
    time_ids = torch.tensor([[24, 8, 0, 0, 24, 8]] * len(latents), dtype=embeds.dtype)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    return unet(latents, timesteps, encoder_hidden_states=embeds[:, :-1], added_cond_kwargs=added).sample


def expected_gradient(trainer, sample, rewards) -> list[torch.Tensor]:
    """The gradient of DDPO's loss at ratios of 1 by autograd through the network in fp64."""
    unet, config = trainer.sd_pipeline.unet, trainer.config
    parameters = [p for p in unet.parameters() if p.requires_grad]
    advantages = (rewards - rewards.mean()) / (rewards.std(unbiased=False) + 1e-8)
    embeds = torch.cat([sample.negative_prompt_embeds, sample.prompt_embeds]).double()
    table = trainer.policy.noise_table.double()
    loss = torch.zeros((), dtype=torch.float64)
    for step in range(config.sample_num_steps):
        t, latents = sample.timesteps[:, step], sample.latents[:, step]
        output = plain_call(unet, trainer.policy.family, torch.cat([latents] * 2), torch.cat([t] * 2), embeds)
        c_x, c_m, sigma = table[t, :3].unbind(1)
        log_prob = ops.score_step(
            ops.guided(output, config.sample_guidance_scale), latents, sample.next_latents[:, step], c_x, c_m, sigma
        )
        loss = loss - (advantages * (log_prob - log_prob.detach()).exp()).mean() / config.sample_num_steps
    return torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_run_has_ratio_one_and_the_gradient_of_autograd_and_its_model_opens(make_trainer, folder, use_lora):
    rewards = torch.tensor([1.0, -2.0], dtype=torch.float64)
    trainer = in_fp64(make_trainer(model=folder, use_lora=use_lora, reward=lambda *_: (rewards, {}), **RUN))
    seen, generate, step = {}, trainer._generate_samples, trainer.engine.step

    def generate_and_differentiate(*args, **kwargs):
        samples, batches = generate(*args, **kwargs)
        with torch.enable_grad(), trainer.engine.computing():
            seen["expected"] = expected_gradient(trainer, samples[0], rewards)
        return samples, batches

    def see_step(*args):
        seen["gradient"] = [parameter.grad.clone() for parameter in trainer.engine.parameters]
        return step(*args)

    trainer._generate_samples, trainer.engine.step = generate_and_differentiate, see_step
    trainer.train()
    assert metrics_of(trainer, "update")[0]["ratio_drift"] < 1e-6
    norm = torch.cat([part.flatten() for part in seen["expected"]]).norm()
    assert norm > 0
    for gradient, expected in zip(seen["gradient"], seen["expected"], strict=True):
        # all but the advantages, in fp32, is computed in fp64
        assert (gradient - expected).norm() < 4 * torch.finfo(torch.float32).eps * norm

    trainer.sd_pipeline.unet.float()
    trainer.save_model()
    final = trainer.output_dir / "final"
    opened = diffusers.StableDiffusionXLPipeline.from_pretrained(final)
    if use_lora:
        opened.load_lora_weights(final)
    assert "StableDiffusionXLPipeline.from_pretrained" in (final / "README.md").read_text()
    family = trainer.policy.family
    inputs = torch.randn(1, 4, 12, 4), torch.tensor([500]), trainer.policy.embed_prompts(["a cat"])[1]
    with torch.no_grad():
        ours, theirs = (plain_call(unet, family, *inputs) for unet in (trainer.sd_pipeline.unet, opened.unet))
        # rounding of sums of a few hundred terms near 1
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_first_ratios_are_one_for_any_micro_batch(make_trainer, folder, precision, micro_batch):
    settings = {**RUN, "mixed_precision": precision, "train_micro_batch_size": micro_batch}
    trainer = make_trainer(model=folder, use_lora=True, **settings)
    limits = drift_limits(trainer)
    trainer.train()
    assert trainer.sd_pipeline.vae.dtype == torch.float32, "its config has force_upcast"
    assert trainer.sd_pipeline.sd_pipeline.text_encoder_2.dtype == trainer.sd_pipeline.unet.dtype
    assert metrics_of(trainer, "update")[0]["ratio_drift"] < limits[0]


def test_a_resumed_run_ends_with_the_same_bits(make_trainer, folder, tmp_path):
    settings = {**RUN, "model": folder, "use_lora": False, "num_epochs": 2}
    whole = make_trainer(output_dir=tmp_path / "whole", **settings)
    whole.train()
    make_trainer(output_dir=tmp_path / "cut", **settings).train(1)
    resumed = make_trainer(output_dir=tmp_path / "cut", resume_from=str(tmp_path / "cut"), **settings)
    resumed.train()
    assert same_bits(trained_weights(whole), trained_weights(resumed))


def test_the_command_line_trains_an_xl_model(folder, tmp_path):
    options = f"--pretrained_model {folder} --output_dir {tmp_path / 'run'} --recipe trl --prompts animals"
    options += " --num_epochs 1 --sample_num_steps 3 --sde_window 0 1 --height 24 --width 8"
    cli.main(["train", *options.split()])
    assert (tmp_path / "run" / "final" / "pytorch_lora_weights.safetensors").exists()
    cli.main(["sample", str(tmp_path / "run"), "--num-images", "1"])
    assert (tmp_path / "run" / "samples.png").exists()
