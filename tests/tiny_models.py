"""Pipelines of every model family with random weights, small enough to build and save in a second; no download.

Each has the layout of the original that it stands for (its classes, its tokenizers' padding, its scheduler, its VAE's
scale) at hidden sizes of 16 to 48, with 8x8 latents of 16x16 images. `MODELS` names them; `save(name, folder)` writes
one as a diffusers folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_run import build_pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from ddpo_fast.tiny_sd import MODEL
from ddpo_fast.tiny_sd.build import SCHEDULER
from ddpo_fast.tiny_sd.drawings import BACKGROUNDS, CODE_POINTS

# widths of the smaller CLIP, the larger CLIP, and T5: as in the originals T5's is more than both CLIPs' together
CLIP, LARGE_CLIP, T5 = 16, 24, 48
IMAGE_SIZE, LATENT_SIZE = 16, 8
# what diffusers must be given to open a folder without T5: its index alone does not say that T5 may be missing
WITHOUT_T5: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}


def clip_tokenizer(**settings: Any) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(MODEL / "tokenizer", **settings)


def clip(tokenizer: CLIPTokenizer, width: int, projects: bool, **settings: Any) -> CLIPTextModel:
    """A text encoder of two layers; one that `projects` also has the pooled output's projection, of the same width."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=1,
        **settings,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()


def two_clips(first_projects: bool) -> dict[str, Any]:
    """The CLIPs of SDXL and SD3 with their tokenizers; the larger one's pads with "!", as OpenCLIP's does with 0."""
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer(pad_token="!")
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": clip(tokenizer, CLIP, first_projects),
        "text_encoder_2": clip(tokenizer_2, LARGE_CLIP, True, hidden_act="gelu"),
    }


def t5_tokenizer(length: int) -> T5TokenizerFast:
    """T5's kind of tokenizer: the words of the bundled captions, and letters for all others."""
    words = " ".join(["a an on photo drawing of background", *CODE_POINTS, *BACKGROUNDS]).split()
    letters = map(chr, range(32, 127))
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces = {"▁" + word: -4.0 for word in words} | dict.fromkeys(letters, -10.0)
    return T5TokenizerFast(vocab=[*specials, *pieces.items()], extra_ids=0, model_max_length=length)


def t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config).eval()


def autoencoder(channels: int, scale: float, shift: float | None = None, **settings: Any) -> AutoencoderKL:
    """A VAE that halves images once; as in the originals, one with a shift has no quant convolutions."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        latent_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=IMAGE_SIZE,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
        **settings,
    ).eval()


def ddim(**settings: Any) -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULER, **settings)


def sd2(prediction_type: str = "v_prediction", zero_snr: bool = True) -> StableDiffusionPipeline:
    """Stable Diffusion 2.1's UNet; by default as its zero-SNR descendants (arXiv 2305.08891)."""
    made = build_pipeline(widths=(8, 16))
    parts = made.components | {
        "unet": UNet2DConditionModel.from_config(
            made.unet.config, use_linear_projection=True, attention_head_dim=[2, 4]
        ),
        "scheduler": ddim(
            prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing"
        ),
    }
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def inpainting() -> StableDiffusionInpaintPipeline:
    """Stable Diffusion's inpainting model: the UNet also takes a mask and a masked image's latents."""
    made = build_pipeline(widths=(8, 16))
    parts = made.components | {"unet": UNet2DConditionModel.from_config(made.unet.config, in_channels=9)}
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def sdxl_unet(text_width: int, time_ids: int, channels: int = 4) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=LATENT_SIZE,
        in_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=text_width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=time_ids * 8 + LARGE_CLIP,
        norm_num_groups=8,
    ).eval()


def sdxl_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    schedule = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    return two_clips(first_projects=False) | {
        "vae": autoencoder(4, scale=0.13025, force_upcast=True),
        "unet": sdxl_unet(CLIP + LARGE_CLIP, time_ids=6),
        "scheduler": EulerDiscreteScheduler(**schedule, timestep_spacing="leading"),
        "force_zeros_for_empty_prompt": True,
    }


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(**sdxl_parts(), add_watermarker=False)


def sdxl_refiner() -> StableDiffusionXLImg2ImgPipeline:
    """SDXL's refiner: the larger CLIP only, and five time ids, one of which is an aesthetic score."""
    parts = sdxl_parts() | {"text_encoder": None, "tokenizer": None, "unet": sdxl_unet(LARGE_CLIP, time_ids=5)}
    return StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)


def sdxl_inpainting() -> StableDiffusionXLInpaintPipeline:
    parts = sdxl_parts() | {"unet": sdxl_unet(CLIP + LARGE_CLIP, time_ids=6, channels=9)}
    return StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)


def sd3(has_t5: bool = True, **transformer: Any) -> StableDiffusion3Pipeline:
    """SD3-medium; without T5 its place is empty, as SD3's documentation advises for small cards."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer(length=24) if has_t5 else None
    config = {
        "sample_size": LATENT_SIZE,
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": T5,
        "caption_projection_dim": 32,
        "pooled_projection_dim": CLIP + LARGE_CLIP,
        "pos_embed_max_size": 12,
    }
    return StableDiffusion3Pipeline(
        **two_clips(first_projects=True),
        tokenizer_3=tokenizer,
        text_encoder_3=t5(tokenizer) if tokenizer else None,
        vae=autoencoder(16, scale=1.5305, shift=0.0609),
        transformer=SD3Transformer2DModel(**(config | transformer)).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sd35() -> StableDiffusion3Pipeline:
    """SD3.5-medium: normalised queries and keys, and blocks with a second attention."""
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def small_patches() -> StableDiffusion3Pipeline:
    """SD3's classes as diffusers' own tests configure them: a token for each latent pixel, a single block, and text
    narrower than the CLIPs' together. Its schedule follows the resolution."""
    made = sd3(has_t5=False, patch_size=1, num_layers=1, joint_attention_dim=CLIP + LARGE_CLIP // 2)
    made.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    return made


def flux(guidance: bool = True) -> FluxPipeline:
    """FLUX.1 dev, whose transformer takes a guidance scale and whose schedule follows the resolution, or schnell."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer(length=24)
    return FluxPipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_encoder=clip(tokenizer, CLIP, projects=False),
        text_encoder_2=t5(tokenizer_2),
        vae=autoencoder(16, scale=0.3611, shift=0.1159),
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5,
            pooled_projection_dim=CLIP,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance else 1.0,
            use_dynamic_shifting=guidance,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    )


MODELS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd2_v_zero_snr": sd2,
    "sd2_epsilon_zero_snr": lambda: sd2("epsilon"),
    "inpainting": inpainting,
    "sdxl": sdxl,
    "sdxl_refiner": sdxl_refiner,
    "sdxl_inpainting": sdxl_inpainting,
    "sd3": sd3,
    "sd3_without_t5": lambda: sd3(has_t5=False),
    "sd3_small_patches": small_patches,
    "sd35": sd35,
    "flux_dev": flux,
    "flux_schnell": lambda: flux(guidance=False),
}


def save(name: str, folder: Path) -> str:
    """Writes a model of `MODELS` as a diffusers folder in fp32, and returns the folder's name."""
    MODELS[name]().save_pretrained(folder)
    return str(folder)
