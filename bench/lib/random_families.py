"""Pipelines of the published sizes of SDXL, Stable Diffusion 3.5 medium and FLUX.1 dev, with random weights.

On the device `meta` they have shapes and no values, which takes seconds and no memory; `save_configs` then writes what
`ddpo-fast plan` reads. `python -m lib.random_families FOLDER` in `bench/` writes the configs of all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from ddpo_fast.tiny_sd import MODEL as BUNDLED

TOKENS = 77


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=autoencoder(4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_l(projects=False),
        text_encoder_2=clip_g(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        unet=UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        scheduler=scheduler(
            EulerDiscreteScheduler,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )


def sd35_medium() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        vae=autoencoder(16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip_l(projects=True),
        text_encoder_2=clip_g(),
        text_encoder_3=t5_xxl(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        tokenizer_3=t5_tokenizer(),
        transformer=SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        scheduler=scheduler(FlowMatchEulerDiscreteScheduler, shift=3.0),
    )


def flux_dev() -> FluxPipeline:
    return FluxPipeline(
        vae=autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip_l(projects=False),
        text_encoder_2=t5_xxl(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        scheduler=scheduler(FlowMatchEulerDiscreteScheduler, shift=3.0, use_dynamic_shifting=True),
    )


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sdxl": sdxl,
    "sd3.5-medium": sd35_medium,
    "flux.1-dev": flux_dev,
}


def clip_tokenizer(**settings: Any) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer", model_max_length=TOKENS, **settings)


def t5_tokenizer() -> T5TokenizerFast:
    """One that knows letters only, as no sizes depend on it."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    vocabulary = [*specials, *((chr(c), -10.0) for c in range(32, 127))]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def clip_l(projects: bool) -> CLIPTextModel:
    return clip(projects, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)


def clip_g() -> CLIPTextModelWithProjection:
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    return clip(True, hidden_act="gelu", **sizes)


def clip(projects: bool, **settings: Any) -> Any:
    tokenizer = clip_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(
        vocab_size=49408,
        max_position_embeddings=TOKENS,
        projection_dim=settings["hidden_size"],
        **special,
        **settings,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def t5_xxl() -> T5EncoderModel:
    config = T5Config(
        vocab_size=32128, d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def autoencoder(channels: int, **settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        latent_channels=channels,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=1024,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
        **settings,
    )


def scheduler(kind: type, **settings: Any) -> Any:
    """With values on any device: it reads them when it is made."""
    with torch.device("cpu"):
        return kind(**settings)


def make(name: str, device: str) -> DiffusionPipeline:
    """A pipeline of `FAMILIES` in fp32 on a device; on `meta` it has no values."""
    torch.manual_seed(0)
    with torch.device(device):
        return FAMILIES[name]()


def save_configs(name: str, folder: Path) -> Path:
    """Writes the folder of a pipeline of `FAMILIES` without its weights, and returns it."""
    pipeline = make(name, "meta")
    pipeline.save_config(folder)
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            save = module.config.save_pretrained if hasattr(module.config, "save_pretrained") else module.save_config
            save(folder / part)
        elif module is not None:
            module.save_pretrained(folder / part)
    return folder


if __name__ == "__main__":
    for family in FAMILIES:
        print(save_configs(family, Path(sys.argv[1]) / family))
