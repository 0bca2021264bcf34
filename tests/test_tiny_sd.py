"""The bundled models have the formats of Stable Diffusion, are small, and follow prompts and guidance."""

from __future__ import annotations

import pytest
import torch
from compare_runs import metrics_of, trained_weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tiny_run import build_trainer
from transformers import CLIPTextModel, CLIPTokenizer

from ddpo_fast.rewards.clip import ClipNetwork
from ddpo_fast.tiny_sd import FLOW_MODEL, MODEL, drawings


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
    assert share_with_backgrounds(images, names) >= 5 / 6


def share_with_backgrounds(images, names):
    """The share of images [B, H, W, 3] whose corner is nearer to the colour that is named than to the others."""
    corners = images[:, :6, :6].mean((1, 2)) * 255
    wanted = torch.tensor([drawings.BACKGROUNDS[name] for name in names], dtype=torch.float32)
    distances = torch.cdist(torch.tensor(corners, dtype=torch.float32), wanted)
    return (distances.argmin(1) == torch.arange(len(names))).float().mean()


def test_guidance_and_prompt_change_the_image(pipeline):
    lion, penguin, empty = draw(pipeline, ["a lion", "a penguin", ""])
    assert abs(lion - penguin).mean() > 0.1
    assert abs(lion - empty).mean() > 0.05
    weak, strong = draw(pipeline, ["a lion"], 1.0)[0], draw(pipeline, ["a lion"], 7.5)[0]
    assert abs(weak - strong).mean() > 0.02


@pytest.fixture(scope="module")
def flow_pipeline():
    pipe = StableDiffusion3Pipeline.from_pretrained(
        FLOW_MODEL, torch_dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_flow_matching_model_is_small():
    assert sum(path.stat().st_size for path in FLOW_MODEL.rglob("*")) < 6e6


# rows of zeros in T5's place: diffusers' number, and none
@pytest.mark.parametrize("rows", [256, 0])
def test_the_flow_matching_model_follows_prompts(flow_pipeline, rows):
    colours = ["red", "blue", "green", "yellow", "black", "white"]
    animals = ["lion", "penguin", "frog", "panda", "whale", "fox"]
    images = flow_pipeline(
        [f"a {animal} on a {colour} background" for animal, colour in zip(animals, colours, strict=True)],
        num_inference_steps=10,
        guidance_scale=3.0,
        max_sequence_length=rows,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert share_with_backgrounds(images, colours) >= 5 / 6
    clip = ClipNetwork("bundled")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    cosines = clip.image_embeds(pixels) @ clip.text_embeds([f"a {animal}" for animal in animals]).T
    assert (cosines.argmax(1) == torch.arange(len(animals))).float().mean() >= 4 / 6


def test_the_flow_matching_model_trains(tmp_path):
    settings = {"sample_num_steps": 2, "sample_eta": 0.7, "sample_batch_size": 2, "sample_num_batches_per_epoch": 1}
    trainer = build_trainer(
        "bundled-flow", tmp_path / "run", use_lora=True, train_gradient_accumulation_steps=1, **settings
    )
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    updates = [row for row in metrics_of(tmp_path / "run") if row["kind"] == "update"]
    # two epochs of an update each, the first on images of the weights that drew them
    assert [row["ratio_drift"] for row in updates[:1]] == pytest.approx([0.0], abs=1e-4)
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in updates)


def test_drawings_are_all_there():
    loaded = drawings.load_drawings()
    assert len(loaded) == 4 * len(drawings.CODE_POINTS)
    assert all(cell.getchannel("A").getextrema()[1] > 200 for _, cell in loaded)
