"""The bundled model has the format of Stable Diffusion, is small, and follows prompts and guidance."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ddpo_fast.tiny_sd import MODEL, drawings


@pytest.fixture(scope="module")
def pipeline():
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipeline, prompts, guidance_scale=3.0):
    """Images [B, H, W, 3] in [0, 1] of prompts."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).expand(len(prompts), -1, -1, -1)
    return pipeline(
        prompts, num_inference_steps=15, guidance_scale=guidance_scale, latents=noise.clone(), output_type="np"
    ).images


def test_the_model_is_a_stable_diffusion(pipeline):
    assert isinstance(pipeline.unet, UNet2DConditionModel)
    assert isinstance(pipeline.vae, AutoencoderKL)
    assert isinstance(pipeline.text_encoder, CLIPTextModel)
    assert isinstance(pipeline.tokenizer, CLIPTokenizer)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    config = pipeline.scheduler.config
    assert (config.beta_schedule, config.beta_start, config.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert (config.prediction_type, config.clip_sample, config.set_alpha_to_one) == ("epsilon", False, False)
    assert sum(path.stat().st_size for path in MODEL.rglob("*")) < 12e6


def test_the_background_follows_the_prompt(pipeline):
    """The corners of 'a lion on a red background' are red, and so for other colours."""
    names = ["red", "blue", "green", "yellow", "black", "white"]
    images = draw(pipeline, [f"a lion on a {name} background" for name in names])
    corners = images[:, :6, :6].mean((1, 2)) * 255
    wanted = torch.tensor([drawings.BACKGROUNDS[name] for name in names], dtype=torch.float32)
    distances = torch.cdist(torch.tensor(corners, dtype=torch.float32), wanted)
    assert (distances.argmin(1) == torch.arange(len(names))).float().mean() >= 5 / 6


def test_guidance_and_prompt_change_the_image(pipeline):
    lion, penguin, empty = draw(pipeline, ["a lion", "a penguin", ""])
    assert abs(lion - penguin).mean() > 0.1
    assert abs(lion - empty).mean() > 0.05
    weak, strong = draw(pipeline, ["a lion"], 1.0)[0], draw(pipeline, ["a lion"], 7.5)[0]
    assert abs(weak - strong).mean() > 0.02


def test_drawings_are_all_there():
    loaded = drawings.load_drawings()
    assert len(loaded) == 4 * len(drawings.CODE_POINTS)
    assert all(cell.getchannel("A").getextrema()[1] > 200 for _, cell in loaded)
