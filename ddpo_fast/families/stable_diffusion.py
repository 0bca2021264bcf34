"""Stable Diffusion 1.x and 2.x: a UNet, one CLIP text encoder, DDIM's steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from ddpo_fast.ddim import DDIMCoefficients
from ddpo_fast.families.base import Family
from ddpo_fast.offload_frozen import on_device


class StableDiffusion(Family):
    title = "Stable Diffusion 1.x or 2.x"
    pipelines = ("StableDiffusionPipeline",)
    parts = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    }
    samplers = ("ddim",)

    def encode(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        text_encoder = self.pipe.text_encoder
        tokens = self.tokens(prompts)
        ids = tokens.input_ids.to(device)
        # the mask is passed where StableDiffusionPipeline.encode_prompt passes it
        masked = getattr(text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(device) if masked else None
        with on_device(text_encoder, device):
            return ids, text_encoder(ids, attention_mask=mask)[0]

    def tokens(self, prompts: Sequence[str]) -> Any:
        """The tokenizer's ids and mask, [B, L] each, truncated or padded to its length."""
        tokenizer = self.pipe.tokenizer
        # a textual inversion of several vectors is one word in the prompt and several tokens
        whole = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)
        return tokenizer(
            whole,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
        )

    def prepare_prompts(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        copies: int,
        guides: bool,
        device: torch.device,
        lora_scale: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        size = self.image_size_of(self.parts_configs(), self.height, self.width)
        self.pipe.check_inputs(prompt, *size, 1, negative_prompt, prompt_embeds, negative_prompt_embeds)
        with on_device(self.pipe.text_encoder, device):
            return self.pipe.encode_prompt(
                prompt,
                device,
                copies,
                guides,
                negative_prompt,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                lora_scale=lora_scale,
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

    def call(
        self, rows: Tensor, keys: Tensor, embeds: Tensor, attention_kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        given = {} if attention_kwargs is None else {"cross_attention_kwargs": attention_kwargs}
        return self.pipe.unet(rows, keys, encoder_hidden_states=embeds, return_dict=False, **given)[0]
