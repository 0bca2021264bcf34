"""FLUX.1 dev and schnell: a transformer of packed latents, with CLIP's pooled embedding and T5's tokens.

Guidance is an input of dev's transformer, which was distilled from a model with guidance, and schnell has none: neither
has a use for negative prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpo_fast.families.base import Config
from ddpo_fast.families.flow import FlowMatching


class Flux(FlowMatching):
    name = title = "FLUX.1"
    recipe = "flux"
    pipelines = (
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
    )
    parts = {
        "transformer": ("FluxTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer_2": ("T5TokenizerFast", "T5Tokenizer"),
    }
    frozen = ("vae", "text_encoder", "text_encoder_2")
    guides_by_rows = False
    # those of Flow-GRPO
    targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    @classmethod
    def check(cls, configs: Mapping[str, Config]) -> None:
        network, latent = configs["transformer"], configs["vae"]["latent_channels"]
        given = network["out_channels"] or network["in_channels"]
        if network["in_channels"] != 4 * latent or given != 4 * latent:
            raise ValueError(
                f"its transformer takes {network['in_channels']} numbers a patch and gives {given}, and one for "
                f"text-to-image takes and gives {4 * latent}"
            )
        for what, key, part, own in (
            ("a pooled embedding", "pooled_projection_dim", "text_encoder", "hidden_size"),
            ("text", "joint_attention_dim", "text_encoder_2", "d_model"),
        ):
            if network[key] != configs[part][own]:
                raise ValueError(
                    f"its transformer takes {what} of width {network[key]}, and its {part} gives {configs[part][own]}"
                )

    @classmethod
    def default_size(cls, configs: Mapping[str, Config]) -> tuple[int, int]:
        # its config does not say; this is diffusers' choice, 1024 x 1024 pixels
        return 128, 128

    @classmethod
    def channels(cls, configs: Mapping[str, Config]) -> int:
        return configs["transformer"]["in_channels"] // 4

    @classmethod
    def first_levels(cls, steps: int) -> Any:
        return np.linspace(1.0, 1 / steps, steps)

    def _encoded(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        tokens, pooled, _ = self.pipe.encode_prompt(prompts, device=device)
        return tokens, pooled

    def call(
        self, rows: Tensor, keys: Tensor, embeds: Tensor, attention_kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        _, _, height, width = rows.shape
        tokens, pooled = self.conditions(embeds)
        output = self.pipe.transformer(
            hidden_states=packed(rows),
            # in the precision of the latents, as in diffusers' pipeline: the network multiplies it by 1000 again
            timestep=self._timesteps(rows, keys).to(rows.dtype) / 1000,
            guidance=self._guidance(rows),
            pooled_projections=pooled,
            encoder_hidden_states=tokens,
            txt_ids=self._ids("text", tokens.shape[1], 1, rows),
            img_ids=self._ids("image", height // 2, width // 2, rows),
            joint_attention_kwargs=attention_kwargs,
            return_dict=False,
        )[0]
        return unpacked(output, height, width)

    def _guidance(self, rows: Tensor) -> Tensor | None:
        """[R] fp32, for networks that take it."""
        if not self.pipe.transformer.config.guidance_embeds:
            return None
        name = "guidance", self.guidance_scale, rows.device
        if name not in self.buffers:
            self.buffers[name] = torch.full([1], self.guidance_scale, device=rows.device)
        return self.buffers[name].expand(len(rows))

    def _ids(self, kind: str, height: int, width: int, rows: Tensor) -> Tensor:
        """Positions of `height` x `width` tokens, [height * width, 3]: row and column of images', zeros of texts'."""
        name = kind, height, width, rows.dtype, rows.device
        if name not in self.buffers:
            ids = torch.zeros(height, width, 3)
            if kind == "image":
                ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)
            self.buffers[name] = ids.flatten(0, 1).to(rows.device, rows.dtype)
        return self.buffers[name]


def packed(latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] as tokens of 2 x 2 pixels, [B, H / 2 * W / 2, 4 C]."""
    patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents [B, C, H, W] of `packed` tokens."""
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
