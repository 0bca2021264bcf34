"""Stable Diffusion 1.x and 2.x: a UNet, one CLIP text encoder, DDIM's steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from packaging.version import Version
from torch import Tensor

from ddpo_fast.ddim import DDIMCoefficients, check_steps, ddim_scheduler, predictions
from ddpo_fast.families.base import Config, Family, Prompts
from ddpo_fast.step_table import Prediction

# the tasks of UNets whose input has more channels than their output, by the number of input channels
CHANNELS = {9: "inpainting", 8: "editing or upscaling", 7: "upscaling", 5: "depth"}
# settings of a UNet that has inputs beside latents, timestep and text, which the trainer would not give it
CONDITIONS = {
    "time_cond_proj_dim": "a guidance scale as an input (a latent consistency model)",
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
    "addition_embed_type": "a second embedding, as Stable Diffusion XL",
    "encoder_hid_dim": "a projection of another encoder's output",
    "encoder_hid_dim_type": "a projection of another encoder's output",
}


class StableDiffusion(Family):
    name = "Stable Diffusion"
    title = "Stable Diffusion 1.x or 2.x"
    recipe = "sd"
    pipelines: ClassVar[Sequence[str]] = ("StableDiffusionPipeline",)
    parts: ClassVar[Mapping[str, Sequence[str]]] = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    }
    unloaded = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    samplers = ("ddim",)

    @classmethod
    def check(cls, configs: Mapping[str, Config]) -> None:
        check_unet(configs, configs["text_encoder"]["hidden_size"])

    @classmethod
    def make_scheduler(cls, config: Config) -> Any:
        return ddim_scheduler(config)

    @classmethod
    def check_steps(cls, scheduler: Any, steps: int, level: float) -> None:
        check_steps(scheduler, steps, level)

    def encode(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        text_encoder = self.pipe.text_encoder
        tokens = self.tokens(prompts)
        ids = tokens.input_ids.to(device)
        # the mask is passed where StableDiffusionPipeline.encode_prompt passes it
        masked = getattr(text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(device) if masked else None
        with self.encoding_on(device):
            return ids, text_encoder(ids, attention_mask=mask)[0]

    def prepare_prompts(self, given: Prompts, device: torch.device) -> tuple[Tensor, Tensor | None]:
        size = self.image_size_of(self.parts_configs(), self.height, self.width)
        embeds, negative = given.prompt_embeds, given.negative_prompt_embeds
        self.pipe.check_inputs(given.prompt, *size, 1, given.negative_prompt, embeds, negative)
        with self.encoding_on(device):
            return self.pipe.encode_prompt(
                given.prompt,
                device,
                given.copies,
                given.guides,
                given.negative_prompt,
                prompt_embeds=embeds,
                negative_prompt_embeds=negative,
                lora_scale=given.lora_scale,
            )

    def set_steps(self, steps: int, device: torch.device | str) -> None:
        self.pipe.scheduler.set_timesteps(steps, device=device)

    @property
    def num_steps(self) -> int | None:
        return self.pipe.scheduler.num_inference_steps

    @property
    def keys(self) -> Tensor:
        return self.pipe.scheduler.timesteps

    def steps_table(self, level: float, device: torch.device, credit: str) -> Tensor:
        return DDIMCoefficients.of(self.pipe.scheduler, level, device, credit).table

    def steps_predictions(self, level: float) -> list[Prediction]:
        return predictions(self.pipe.scheduler, level)

    def call(
        self, rows: Tensor, keys: Tensor, embeds: Tensor, attention_kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        given = {} if attention_kwargs is None else {"cross_attention_kwargs": attention_kwargs}
        return self.pipe.unet(rows, keys, encoder_hidden_states=embeds, return_dict=False, **given)[0]


def check_unet(configs: Mapping[str, Any], text_width: int, allowed: Collection[str] = ()) -> None:
    """Raises `ValueError` for a UNet with other inputs than a run gives it. Repairs the sizes of old configs in place.

    Args:
        text_width: of the encoded prompts.
        allowed: the `CONDITIONS` that it may have.
    """
    unet = configs["unet"]
    taken, given, latent = unet["in_channels"], unet["out_channels"], configs["vae"]["latent_channels"]
    if taken != given:
        kind = f", as one for {CHANNELS[taken]} does" if taken in CHANNELS else ""
        raise ValueError(f"its UNet takes {taken!r} channels and gives {given!r}{kind}")
    for key, what in CONDITIONS.items():
        if unet.get(key) is not None and key not in allowed:
            raise ValueError(f"its UNet takes {what} ({key} is {unet[key]!r})")
    widths = unet["cross_attention_dim"]
    for width in widths if isinstance(widths, list | tuple) else [widths]:
        if width != text_width:
            raise ValueError(f"its UNet takes text of width {width!r}, and its text encoding has {text_width}")
    if taken != latent:
        raise ValueError(f"its UNet takes {taken!r} channels, and its VAE gives {latent!r}")
    size = unet["sample_size"]
    edges = [size, size] if isinstance(size, int) else size
    if not (isinstance(edges, list | tuple) and len(edges) == 2 and all(_is_count(edge) for edge in edges)):
        raise ValueError(f"its UNet's sample_size is {size!r} but must be a number or [height, width] of latents")
    # `StableDiffusionPipeline`'s constructor repairs configs of diffusers before 0.9 in the same way
    version = unet.get("_diffusers_version")
    if isinstance(size, int) and size < 64 and version and Version(Version(version).base_version) < Version("0.9.0"):
        unet["sample_size"] = 64


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
