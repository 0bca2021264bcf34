"""Stochastic DDIM sampling with classifier-free guidance that keeps every latent and its exact log-prob.

Shapes: B images, T denoising steps, C H W latent, L tokens, D width of the text embedding.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor
from torch.utils.checkpoint import checkpoint

from ddpo_fast import ops
from ddpo_fast.ddim import NoiseSchedule
from ddpo_fast.offload_frozen import on_device

# An image of 512 x 512 takes about a gigabyte while it is decoded in half precision, and eight keep a GPU busy.
DECODED_AT_ONCE = 8 * 64 * 64

# `pipe` is a diffusers StableDiffusionPipeline, whose parts diffusers does not declare as attributes


@dataclass
class DDPOPipelineOutput:
    """What a pipeline returns.

    Args:
        images: the images, [B, 3, height, width] in fp32 in [0, 1] for `output_type="pt"`.
        latents: T + 1 tensors [B, C, H, W], from the initial noise to the latents of the images.
        log_probs: T tensors [B]; empty for eta = 0, where a step has no density.
    """

    images: Any
    latents: list[torch.Tensor]
    log_probs: list[torch.Tensor]


@dataclass
class DDPOSchedulerOutput:
    """What `scheduler_step` returns: the next latents [B, C, H, W] and their log-prob [B] (None for eta = 0)."""

    latents: torch.Tensor
    log_probs: torch.Tensor | None


# (latents of all rows, timestep, index of the step) -> the UNet's output
Predict = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
# (latents of all rows, latents [B, C, H, W], noise [B, C, H, W], timestep, index of the step) -> the step taken
TakeStep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], ops.Step]


def latent_shape(unet: Any) -> tuple[int, int, int]:
    """(C, H, W) of an image's latents."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


@torch.no_grad()
def generate(pipe: Any, *args: Any, **kwargs: Any) -> DDPOPipelineOutput:
    """Draws images; the arguments are `StableDiffusionPipeline`'s, see `_generate`."""
    return _generate(pipe, lambda predict: predict, *args, **kwargs)


def generate_with_grad(
    pipe: Any,
    *args: Any,
    truncated_backprop: bool = True,
    truncated_backprop_rand: bool = True,
    gradient_checkpoint: bool = True,
    truncated_backprop_timestep: int = 49,
    truncated_rand_backprop_minmax: tuple[int, int] = (0, 50),
    **kwargs: Any,
) -> DDPOPipelineOutput:
    """Like `generate`, and the images carry a gradient to the UNet (AlignProp, arXiv 2310.03739).

    With `truncated_backprop`, step i passes no gradient if it is before `truncated_backprop_timestep`, or before a
    random number from `truncated_rand_backprop_minmax` drawn for each step with `truncated_backprop_rand`.
    """

    def with_grad(predict: Predict) -> Predict:
        def truncated(rows: torch.Tensor, t: torch.Tensor, i: int) -> torch.Tensor:
            output = (
                checkpoint(predict, rows, t, i, use_reentrant=False) if gradient_checkpoint else predict(rows, t, i)
            )
            first = truncated_backprop_timestep
            if truncated_backprop and truncated_backprop_rand:
                first = random.randint(*truncated_rand_backprop_minmax)
            return output.detach() if truncated_backprop and i < first else output

        return truncated

    return _generate(pipe, with_grad, *args, **kwargs)


def _generate(
    pipe: Any,
    wrap: Callable[[Predict], Predict],
    prompt: str | list[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | list[str] | None = None,
    num_images_per_prompt: int = 1,
    eta: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    latents: torch.Tensor | None = None,
    prompt_embeds: torch.Tensor | None = None,
    negative_prompt_embeds: torch.Tensor | None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    callback_steps: int = 1,
    cross_attention_kwargs: dict[str, Any] | None = None,
    guidance_rescale: float = 0.0,
) -> DDPOPipelineOutput:
    """TRL's `pipeline_step`: the same arguments, defaults and order of random draws (`return_dict` has no effect)."""
    # long by its eighteen arguments, which are TRL's; the chain itself is `denoise`
    _, *size = latent_shape(pipe.unet)
    height, width = height or size[0] * pipe.vae_scale_factor, width or size[1] * pipe.vae_scale_factor
    pipe.check_inputs(prompt, height, width, callback_steps, negative_prompt, prompt_embeds, negative_prompt_embeds)
    device, guide = pipe.unet.device, guidance_scale > 1.0
    with torch.no_grad(), on_device(pipe.text_encoder, device):
        text, negative = pipe.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            guide,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
        )
        embeds = (torch.cat([negative, text]) if guide else text).to(pipe.unet.dtype)
        pipe.scheduler.set_timesteps(num_inference_steps, device=device)
        # fp32 whatever the networks' precision: the log-prob is that of the latents as they are stored
        latents = pipe.prepare_latents(
            len(text), pipe.unet.config.in_channels, height, width, torch.float32, device, generator, latents
        )

    def predict(rows: torch.Tensor, t: torch.Tensor, i: int) -> torch.Tensor:
        return pipe.unet(
            rows,
            t,
            encoder_hidden_states=embeds,
            cross_attention_kwargs=cross_attention_kwargs,
            return_dict=False,
        )[0]

    def after_step(i: int, t: torch.Tensor, latents_BCHW: torch.Tensor) -> None:
        if callback is not None and i % callback_steps == 0:
            callback(i, t, latents_BCHW)

    def draw_noise(_i: int) -> torch.Tensor:
        return randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)

    take_step = step_taker(pipe, wrap(predict), guidance_scale if guide else None, guidance_rescale, eta)
    trail, log_probs = denoise(pipe, take_step, latents, draw_noise, 2 if guide else 1, after_step)
    return DDPOPipelineOutput(decode(pipe, trail[-1], output_type), trail, log_probs if eta > 0 else [])


def step_taker(
    pipe: Any, predict: Predict, guidance_scale: float | None, guidance_rescale: float, eta: float
) -> TakeStep:
    """A step of the chain with the UNet's call in it.

    `predict` is given [B, C, H, W] rows, or twice as many with guidance.
    """
    table = NoiseSchedule.of(pipe.scheduler, eta, pipe.unet.device).table

    def take_step(rows: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, i: int) -> ops.Step:
        output = predict(pipe.scheduler.scale_model_input(rows, t), t, i)
        if guidance_scale is None or guidance_rescale <= 0:
            return ops.step_logprob(output, latents, noise, table, t, guidance_scale)
        combined = ops.guided(output, guidance_scale)
        combined = rescale_noise_cfg(combined, output.chunk(2)[1], guidance_rescale=guidance_rescale)
        step = ops.step_logprob(combined, latents, noise, table, t)
        return step._replace(unet_input=torch.cat([step.unet_input] * 2))

    return take_step


def denoise(
    pipe: Any,
    take_step: TakeStep,
    latents: torch.Tensor,
    draw_noise: Callable[[int], torch.Tensor],
    copies: int,
    after_step: Callable[[int, torch.Tensor, torch.Tensor], None] = lambda i, t, latents: None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The T-step Gaussian chain from noise `latents` [B, C, H, W]: (T + 1 latents, T log-probs [B]).

    Args:
        draw_noise: the noise [B, C, H, W] of a step's index.
        copies: rows of the UNet for an image.
    """
    # laid out as the UNet's output is, which later rows are made like
    last = pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    rows = torch.cat([latents] * copies).to(pipe.unet.dtype, memory_format=layout)
    trail, log_probs = [latents], []
    with pipe.progress_bar(total=len(pipe.scheduler.timesteps)) as progress:
        for i, t in enumerate(pipe.scheduler.timesteps):
            step = take_step(rows, latents, draw_noise(i), t, i)
            rows, latents = step.unet_input, step.latents
            trail.append(latents)
            log_probs.append(step.log_probs)
            progress.update()
            after_step(i, t, latents)
    return trail, log_probs


def decode(pipe: Any, latents: torch.Tensor, output_type: str) -> Any:
    """Latents to images of diffusers' `output_type` ('pil', 'np', 'pt' or 'latent'), a few at a time."""
    if output_type == "latent":
        return latents
    at_once = max(1, DECODED_AT_ONCE // latents.shape[-2:].numel())
    parts = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype).split(at_once)
    with on_device(pipe.vae, latents.device):
        pixels = torch.cat([pipe.vae.decode(part, return_dict=False)[0] for part in parts])
    # in fp32 whatever the VAE's precision: people turn them into NumPy's arrays, which have no bf16
    pixels = pixels.float()
    return pipe.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=[True] * len(pixels))
