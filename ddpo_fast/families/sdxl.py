"""Stable Diffusion XL (arXiv 2307.01952): a UNet that also takes a pooled text embedding and the image's size.

It has two CLIP text encoders. Their token embeddings, each of the last layer but one, lie side by side; the pooled
embedding is the second encoder's. The size is given as six numbers ("time ids"): the height and width of the original
image, the top and left of the crop, the height and width of the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpo_fast.families.base import Config, Prompts, with_pooled, without_pooled
from ddpo_fast.families.stable_diffusion import StableDiffusion, check_unet

TIME_IDS = 6


class SDXL(StableDiffusion):
    name = title = "Stable Diffusion XL"
    recipe = "sdxl"
    pipelines = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    )
    parts = {
        **StableDiffusion.parts,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    }
    unloaded = {"feature_extractor": None, "image_encoder": None}
    frozen = ("vae", "text_encoder", "text_encoder_2")

    @classmethod
    def check(cls, configs: Mapping[str, Config]) -> None:
        unet, encoder, second = (configs[part] for part in ("unet", "text_encoder", "text_encoder_2"))
        pooled = second["projection_dim"]
        given = TIME_IDS * (unet["addition_time_embed_dim"] or 0) + pooled
        if unet["addition_embed_type"] != "text_time" or unet["projection_class_embeddings_input_dim"] != given:
            raise ValueError(
                f"its UNet takes {unet['projection_class_embeddings_input_dim']} numbers beside the prompt's tokens, "
                f"and that of a base model of Stable Diffusion XL takes {given}, a pooled embedding and {TIME_IDS} "
                "time ids, of which a refiner has 5"
            )
        check_unet(configs, encoder["hidden_size"] + second["hidden_size"], allowed=("addition_embed_type",))

    @classmethod
    def dtype_of(cls, part: str, config: Config, dtype: torch.dtype) -> torch.dtype:
        # its activations leave the range of fp16, and the images are black
        return torch.float32 if part == "vae" and config.get("force_upcast") else dtype

    def encode(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        ids = self.tokens(prompts).input_ids.to(device)
        with self.encoding_on(device):
            tokens, _, pooled, _ = self.pipe.encode_prompt(
                list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return ids, with_pooled(tokens, pooled)

    def no_negative(self, empty: Tensor) -> Tensor:
        # as the plain pipeline does for a negative prompt of None; it encodes one of ''
        return torch.zeros_like(empty) if self.pipe.config.force_zeros_for_empty_prompt else empty

    def negatives(self, prompt: str | None, count: int) -> list[str] | None:
        return [prompt] * count if prompt else None

    def prepare_prompts(self, given: Prompts, device: torch.device) -> tuple[Tensor, Tensor | None]:
        size = self.image_size_of(self.parts_configs(), self.height, self.width)
        embeds, pooled = self._parts_of(given.prompt_embeds)
        negative, negative_pooled = self._parts_of(given.negative_prompt_embeds)
        texts = {
            "negative_prompt": given.negative_prompt,
            "prompt_embeds": embeds,
            "negative_prompt_embeds": negative,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }
        self.pipe.check_inputs(given.prompt, None, *size, 1, **texts)
        with self.encoding_on(device):
            embeds, negative, pooled, negative_pooled = self.pipe.encode_prompt(
                given.prompt,
                device=device,
                num_images_per_prompt=given.copies,
                do_classifier_free_guidance=given.guides,
                lora_scale=given.lora_scale,
                **texts,
            )
        return with_pooled(embeds, pooled), with_pooled(negative, negative_pooled) if given.guides else None

    def _parts_of(self, embeds: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if embeds is None else without_pooled(embeds, self._pooled_width)

    @property
    def _pooled_width(self) -> int:
        return self.pipe.text_encoder_2.config.projection_dim

    def call(
        self, rows: Tensor, keys: Tensor, embeds: Tensor, attention_kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        tokens, pooled = without_pooled(embeds, self._pooled_width)
        return self.pipe.unet(
            rows,
            keys,
            encoder_hidden_states=tokens,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": self._time_ids(embeds).expand(len(rows), -1)},
            cross_attention_kwargs=attention_kwargs,
            return_dict=False,
        )[0]

    def latents_of_vae(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return super().latents_of_vae(latents)
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return latents * std / config.scaling_factor + mean

    def _time_ids(self, embeds: Tensor) -> Tensor:
        """[1, 6] for images of the present size, in the dtype and on the device of `embeds`."""
        height, width = self.image_size_of(self.parts_configs(), self.height, self.width)
        # kept, as a tensor that is made of Python's numbers is copied from the host, which no CUDA graph can record
        name = height, width, embeds.dtype, embeds.device
        if name not in self.buffers:
            ids = [height, width, 0, 0, height, width]
            self.buffers[name] = torch.tensor([ids], dtype=embeds.dtype, device=embeds.device)
        return self.buffers[name]
