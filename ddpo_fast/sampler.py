"""Stochastic DDIM sampling with classifier-free guidance that keeps every latent and its exact log-prob.

Shapes: B images, T denoising steps, C H W latent, L tokens, D width of the text embedding.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor
from torch.utils.checkpoint import checkpoint

from ddpo_fast import ops
from ddpo_fast.families import Family, Prompts
from ddpo_fast.offload_frozen import on_device
from ddpo_fast.unet import shares_halves

# In pixels of the latents (64 x 64 for an image of 512 x 512). Such an image takes about a gigabyte while it is decoded
# in half precision, and eight of them keep a GPU busy.
DECODED_AT_ONCE = 8 * 64 * 64


@dataclass
class DDPOPipelineOutput:
    """What a pipeline returns.

    Args:
        images: the images, [B, 3, height, width] in fp32 in [0, 1] for `output_type="pt"`.
        latents: T + 1 tensors [B, C, H, W], from the initial noise to the latents of the images.
        log_probs: T tensors [B]; 0 for a step without noise, which has no density, and empty for eta = 0.
    """

    images: Any
    latents: list[torch.Tensor]
    log_probs: list[torch.Tensor]


@dataclass
class DDPOSchedulerOutput:
    """What `scheduler_step` returns: the next latents [B, C, H, W] and their log-prob [B] (None for eta = 0)."""

    latents: torch.Tensor
    log_probs: torch.Tensor | None


class DenoisingChain:
    """The T-step Gaussian chain from noise to images for one set of embeddings.

    Subclasses change how the UNet is called (`predict`) or what goes around a step (`take_step`).

    Args:
        family: has its steps set.
        embeds: [B, L, D], or [2B, L, D] with guidance, the negative prompts first.
        guidance_scale: None for no guidance by rows of the negative prompt.
        eta: share of DDPM's noise; 0 makes the steps deterministic, without a density.
        guidance_rescale: factor of the rescaling of guided outputs of arXiv 2305.08891, section 3.4; 0 for none.
        cross_attention_kwargs: keyword arguments of the UNet's attention processors.
    """

    def __init__(
        self,
        family: Family,
        embeds: torch.Tensor,
        guidance_scale: float | None,
        eta: float,
        guidance_rescale: float = 0.0,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.family = family
        self.embeds = embeds
        self.guidance_scale = guidance_scale
        self.guidance_rescale = guidance_rescale
        self.cross_attention_kwargs = cross_attention_kwargs
        self.table = family.table(eta, family.denoiser.device)
        # a bar that counts the steps of several chains; None for one of this chain's own
        self.bar: Any = None

    def predict(self, rows: torch.Tensor, t: torch.Tensor, i: int) -> torch.Tensor:
        """The UNet's output for the rows of step i, [B, C, H, W], or twice as many with guidance."""
        if self.guidance_scale is not None and shares_halves(self.family.denoiser):
            # both halves are the same latents
            rows = rows[: len(rows) // 2]
        return self.family.call(rows, t, self.embeds, self.cross_attention_kwargs)

    def take_step(
        self, rows: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, i: int
    ) -> ops.Step:
        """Step i at timestep t [] from `latents` with `noise`, both [B, C, H, W]; `rows` are the UNet's input."""
        output = self.predict(rows, t, i)
        if self.guidance_scale is None or self.guidance_rescale <= 0:
            # computes guidance, mean, next latents, log-prob and the UNet's next input together
            return ops.step_logprob(output, latents, noise, self.table, t, self.guidance_scale)
        combined = ops.guided(output, self.guidance_scale)
        combined = rescale_noise_cfg(combined, output.chunk(2)[1], guidance_rescale=self.guidance_rescale)
        # called without guidance, so `unet_input` has one row per image: guidance needs two
        step = ops.step_logprob(combined, latents, noise, self.table, t)
        return step._replace(unet_input=torch.cat([step.unet_input] * 2))

    def run(
        self,
        latents: torch.Tensor,
        draw_noise: Callable[[], torch.Tensor],
        after_step: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """All steps from initial noise `latents` [B, C, H, W]: (T + 1 latents, T log-probs [B]).

        Args:
            draw_noise: returns the noise [B, C, H, W] of the next step.
            after_step: called with the step's index, its timestep and the latents that it led to.
        """
        # The first rows are made in the memory layout of the UNet's weights, which its output has too. `take_step`
        # makes all later rows in the layout of the output.
        conv_in = getattr(self.family.denoiser, "conv_in", None)
        last = conv_in is not None and conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        copies = 1 if self.guidance_scale is None else 2
        rows = torch.cat([latents] * copies).to(self.family.denoiser.dtype, memory_format=layout)
        trail, log_probs = [latents], []
        own = self.family.pipe.progress_bar(total=len(self.family.keys)) if self.bar is None else nullcontext(self.bar)
        with own as progress:
            for i, t in enumerate(self.family.keys):
                latents, log_prob, rows = self.take_step(rows, latents, draw_noise(), t, i)
                trail.append(latents)
                log_probs.append(log_prob if self.family.has_noise(i) else torch.zeros_like(log_prob))
                progress.update()
                if after_step is not None:
                    after_step(i, t, latents)
        return trail, log_probs


@dataclass(frozen=True)
class Truncation:
    """Which steps of a chain pass a gradient to the UNet, as in AlignProp (arXiv 2310.03739).

    With `truncated_backprop`, step i passes none if i is less than `truncated_backprop_timestep` or, with
    `truncated_backprop_rand`, less than a random number within `truncated_rand_backprop_minmax`, drawn for each step.
    With `gradient_checkpoint`, a UNet call keeps no activations and is run again in the backward pass.
    """

    truncated_backprop: bool = True
    truncated_backprop_rand: bool = True
    gradient_checkpoint: bool = True
    truncated_backprop_timestep: int = 49
    truncated_rand_backprop_minmax: tuple[int, int] = (0, 50)


class TruncatedChain(DenoisingChain):
    """A chain with an autograd graph, whose early steps pass no gradient to the UNet (see `Truncation`)."""

    def __init__(self, truncation: Truncation, *args: Any) -> None:
        super().__init__(*args)
        self.truncation = truncation

    def predict(self, rows: torch.Tensor, t: torch.Tensor, i: int) -> torch.Tensor:
        how = self.truncation
        if how.gradient_checkpoint:
            output = checkpoint(super().predict, rows, t, i, use_reentrant=False)
        else:
            output = super().predict(rows, t, i)
        first = how.truncated_backprop_timestep
        if how.truncated_backprop and how.truncated_backprop_rand:
            first = random.randint(*how.truncated_rand_backprop_minmax)
        return output.detach() if how.truncated_backprop and i < first else output


@torch.no_grad()
def generate(family: Family, *args: Any, **kwargs: Any) -> DDPOPipelineOutput:
    """Draws images; the arguments are `StableDiffusionPipeline`'s, see `_generate`."""
    return _generate(family, None, *args, **kwargs)


def generate_with_grad(
    family: Family,
    *args: Any,
    truncated_backprop: bool = True,
    truncated_backprop_rand: bool = True,
    gradient_checkpoint: bool = True,
    truncated_backprop_timestep: int = 49,
    truncated_rand_backprop_minmax: tuple[int, int] = (0, 50),
    **kwargs: Any,
) -> DDPOPipelineOutput:
    """Like `generate`, but the images carry a gradient to the UNet, through the steps that `Truncation` selects."""
    truncation = Truncation(
        truncated_backprop,
        truncated_backprop_rand,
        gradient_checkpoint,
        truncated_backprop_timestep,
        truncated_rand_backprop_minmax,
    )
    return _generate(family, truncation, *args, **kwargs)


def _generate(
    family: Family,
    truncation: Truncation | None,
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
    """TRL's `pipeline_step`: the same arguments, defaults and order of random draws (`return_dict` has no effect).

    `truncation` is for images with a gradient, None for those without.
    """
    if not isinstance(callback_steps, int) or callback_steps < 1:
        raise ValueError(f"callback_steps is {callback_steps!r} but must be a whole number of at least 1")
    family = family.at(height, width, guidance_scale)
    device, guides = family.denoiser.device, guidance_scale > 1.0 and family.guides_by_rows
    with torch.no_grad():
        given = Prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            copies=num_images_per_prompt,
            guides=guides,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
        )
        text, negative = family.prepare_prompts(given, device)
        embeds = (text if negative is None else torch.cat([negative, text])).to(family.denoiser.dtype)
        family.set_steps(num_inference_steps, device)
        if isinstance(generator, list) and len(generator) != len(text):
            raise ValueError(f"there are {len(generator)} generators for {len(text)} images: give one for each")
        if latents is None:
            # fp32 whatever the networks' precision: a log-prob is computed on the values that training reads back
            shape = len(text), *family.latent_shape
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device)

    def after_step(i: int, t: torch.Tensor, latents_BCHW: torch.Tensor) -> None:
        if callback is not None and i % callback_steps == 0:
            callback(i, t, latents_BCHW)

    def draw_noise() -> torch.Tensor:
        return randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)

    run = family, embeds, guidance_scale if guides else None, eta, guidance_rescale, cross_attention_kwargs
    chain = DenoisingChain(*run) if truncation is None else TruncatedChain(truncation, *run)
    trail, log_probs = chain.run(latents, draw_noise, after_step)
    return DDPOPipelineOutput(decode(family, trail[-1], output_type), trail, log_probs if eta > 0 else [])


def decode(family: Family, latents: torch.Tensor, output_type: str) -> Any:
    """Latents to images of diffusers' `output_type` ('pil', 'np', 'pt' or 'latent'), a few at a time."""
    if output_type == "latent":
        return latents
    vae: Any = family.pipe.vae
    at_once = max(1, DECODED_AT_ONCE // latents.shape[-2:].numel())
    parts = family.latents_of_vae(latents).to(vae.dtype).split(at_once)
    with on_device(vae, latents.device):
        pixels = torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])
    # in fp32 whatever the VAE's precision, because images may be converted to NumPy, which has no bf16
    pixels = pixels.float()
    processor = family.pipe.image_processor
    return processor.postprocess(pixels, output_type=output_type, do_denormalize=[True] * len(pixels))
