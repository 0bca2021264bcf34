"""A Stable Diffusion small enough to train in a second, and settings to go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddpo_fast.config import DDPOConfig
from ddpo_fast.pipeline import DefaultDDPOStableDiffusionPipeline
from ddpo_fast.tiny_sd import MODEL
from ddpo_fast.tiny_sd.build import SCHEDULER
from ddpo_fast.trainer import DDPOTrainer


def forget_accelerate_state() -> None:
    """Clears the state that accelerate keeps for the whole process, as every run here has settings of its own."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


def build_pipeline(prediction_type: str = "epsilon", widths: tuple[int, int] = (16, 32)) -> StableDiffusionPipeline:
    """Random weights of SD's kind: 16x16 images, 8x8 latents, a UNet of 250,000 weights at these widths."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        block_out_channels=widths,
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        latent_channels=4,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


SETTINGS = {
    "num_epochs": 2,
    "mixed_precision": "no",
    "sample_num_steps": 5,
    "sample_batch_size": 4,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 2,
    "train_gradient_accumulation_steps": 2,
    "train_learning_rate": 1e-3,
}


class Prompts:
    """Draws prompts from a generator of its own, so that TRL's trainer and ours see the same ones."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self) -> tuple[str, dict]:
        names = ["a cat", "a dog", "a horse", "a bee"]
        return names[int(torch.randint(len(names), (1,), generator=self.generator))], {}


def brightness(images, prompts, metadata):
    return images.float().mean((1, 2, 3)), {}


def build_trainer(
    model: str | Path,
    output_dir: str | Path,
    *,
    reward: Any = brightness,
    prompts: Any = None,
    hook: Any = None,
    eval_reward: Any = None,
    eval_prompts: Any = None,
    sample_prompts: Any = None,
    use_lora: bool = False,
    pipeline: Any = None,
    trainer_class: type[DDPOTrainer] = DDPOTrainer,
    draws: bool = False,
    **settings: Any,
) -> DDPOTrainer:
    """A trainer with `SETTINGS`, but for `settings`, as the first one of its process.

    It draws rewards.png and report.html only if `draws` is set, as that takes a fifth of such a run's time.
    """
    forget_accelerate_state()
    config = DDPOConfig(**{**SETTINGS, "output_dir": output_dir and str(output_dir), **settings})
    pipeline = pipeline or DefaultDDPOStableDiffusionPipeline(str(model), use_lora=use_lora)
    functions = {"eval_reward_function": eval_reward, "eval_prompt_function": eval_prompts}
    functions["sample_prompt_function"] = sample_prompts
    functions = {name: function for name, function in functions.items() if function is not None}
    trainer = trainer_class(config, reward, prompts or Prompts(), pipeline, image_samples_hook=hook, **functions)
    if not draws:
        trainer.draw_reports = lambda: None
    return trainer
