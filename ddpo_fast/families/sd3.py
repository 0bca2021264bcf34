"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a joint transformer, two CLIP text encoders and T5.

The CLIPs' token embeddings lie side by side, filled up to T5's width, and T5's tokens follow; T5 may be left out, and
then zeros are in its place. The pooled embedding is both CLIPs'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpo_fast.families.base import Config
from ddpo_fast.families.flow import FlowMatching

CLIPS, T5S = ("CLIPTokenizer", "CLIPTokenizerFast"), ("T5TokenizerFast", "T5Tokenizer")


class StableDiffusion3(FlowMatching):
    name = title = "Stable Diffusion 3 or 3.5"
    recipe = "sd3"
    pipelines = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    )
    parts = {
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "tokenizer": CLIPS,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": CLIPS,
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer_3": T5S,
    }
    optional = ("text_encoder_3", "tokenizer_3")
    frozen = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    # those of Flow-GRPO
    targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    @classmethod
    def check(cls, configs: Mapping[str, Config]) -> None:
        network, clips = configs["transformer"], [configs["text_encoder"], configs["text_encoder_2"]]
        if network["in_channels"] != configs["vae"]["latent_channels"]:
            raise ValueError(
                f"its transformer takes {network['in_channels']} channels, and its VAE gives "
                f"{configs['vae']['latent_channels']}: it is made for another task than text-to-image"
            )
        pooled, width = sum(clip["projection_dim"] for clip in clips), network["joint_attention_dim"]
        if network["pooled_projection_dim"] != pooled:
            raise ValueError(
                f"its transformer takes a pooled embedding of {network['pooled_projection_dim']} elements, and its "
                f"text encoders give {pooled}"
            )
        t5 = configs.get("text_encoder_3")
        # diffusers cuts the CLIPs' token embeddings where they are wider
        if t5 is not None and t5["d_model"] != width:
            raise ValueError(f"its transformer takes text of width {width}, and its T5 gives {t5['d_model']}")

    @classmethod
    def patch(cls, configs: Mapping[str, Config]) -> int:
        return configs["transformer"]["patch_size"]

    @classmethod
    def check_size(cls, configs: Mapping[str, Config], height: int | None, width: int | None) -> None:
        super().check_size(configs, height, width)
        most = configs["transformer"]["pos_embed_max_size"] * cls.patch(configs) * cls.vae_scale(configs)
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and pixels > most:
                raise ValueError(f"{name} is {pixels}, but the model has positions for at most {most} pixels: use less")

    def _encoded(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False
        )
        return tokens, pooled

    def call(
        self, rows: Tensor, keys: Tensor, embeds: Tensor, attention_kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        tokens, pooled = self.conditions(embeds)
        return self.pipe.transformer(
            hidden_states=rows,
            timestep=self._timesteps(rows, keys),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            joint_attention_kwargs=attention_kwargs,
            return_dict=False,
        )[0]
