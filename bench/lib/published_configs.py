"""The configs of published models at full size, without weights: what is needed to predict a run's memory.

As the models' own config files and papers have them; what is diffusers' or transformers' default is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Config = dict[str, Any]

CLIP_L: Config = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
# OpenCLIP's ViT-bigG/14
CLIP_G: Config = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL: Config = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}


def _vae(channels: int, scale: float, **settings: Any) -> Config:
    return {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": channels,
        "scaling_factor": scale,
        "sample_size": 1024,
        **settings,
    }


SDXL: dict[str, tuple[str, Config]] = {
    "unet": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "vae": ("AutoencoderKL", _vae(4, 0.13025, force_upcast=True)),
    "text_encoder": ("CLIPTextModel", CLIP_L),
    "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
    "scheduler": (
        "EulerDiscreteScheduler",
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "steps_offset": 1,
            "timestep_spacing": "leading",
        },
    ),
}
SD35_MEDIUM: dict[str, tuple[str, Config]] = {
    "transformer": (
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "vae": ("AutoencoderKL", _vae(16, 1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)),
    "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
    "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
    "text_encoder_3": ("T5EncoderModel", T5_XXL),
    "scheduler": ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0}),
}
FLUX_DEV: dict[str, tuple[str, Config]] = {
    "transformer": (
        "FluxTransformer2DModel",
        {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
    ),
    "vae": ("AutoencoderKL", _vae(16, 0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)),
    "text_encoder": ("CLIPTextModel", CLIP_L),
    "text_encoder_2": ("T5EncoderModel", T5_XXL),
    "scheduler": (
        "FlowMatchEulerDiscreteScheduler",
        {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True},
    ),
}
MODELS = {
    "sdxl": ("StableDiffusionXLPipeline", SDXL),
    "sd35_medium": ("StableDiffusion3Pipeline", SD35_MEDIUM),
    "flux_dev": ("FluxPipeline", FLUX_DEV),
}


def write(name: str, folder: Path) -> str:
    """Writes a model's configs as a diffusers folder without weights, and returns its name."""
    pipeline, parts = MODELS[name]
    index: dict[str, Any] = {"_class_name": pipeline}
    for part, (kind, config) in parts.items():
        is_text = part.startswith("text_encoder")
        index[part] = ["transformers" if is_text else "diffusers", kind]
        if is_text:
            tokenizer = part.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", "T5TokenizerFast" if kind.startswith("T5") else "CLIPTokenizer"]
            (folder / tokenizer).mkdir(parents=True)
        (folder / part).mkdir(parents=True)
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps({"_class_name": kind, **config} if not is_text else config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)
