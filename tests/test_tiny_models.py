"""The tiny models of each family open in plain diffusers, and draw what their prompts and parts say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_models import IMAGE_SIZE, LATENT_SIZE, MODELS, WITHOUT_T5, t5_tokenizer

TEXT_TO_IMAGE = [name for name in MODELS if "inpainting" not in name and "refiner" not in name]


def draw(pipeline: DiffusionPipeline, prompt: str, **settings) -> torch.Tensor:
    """Latents [1, ...] of a prompt, from the same noise for every prompt."""
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, num_inference_steps=2, generator=generator, output_type="latent", **size, **settings).images


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_plain_diffusers_opens_them_and_prompts_matter(name, tiny_model):
    absent = WITHOUT_T5 if name in ("sd3_without_t5", "sd3_small_patches") else {}
    pipeline = DiffusionPipeline.from_pretrained(tiny_model(name), **absent)
    assert (
        pipeline.__class__.__name__ == json.loads(Path(tiny_model(name), "model_index.json").read_text())["_class_name"]
    )
    cat, other = draw(pipeline, "a cat"), draw(pipeline, "a purple zzz")
    assert cat.isfinite().all() or name == "sd2_epsilon_zero_snr"
    assert (cat - other).abs().max() > 1e-4 or name == "sd2_epsilon_zero_snr"
    if name == "flux_dev":
        assert (cat - draw(pipeline, "a cat", guidance_scale=1.0)).abs().max() > 1e-4
    if not name.startswith("flux"):
        # FLUX's are packed
        assert cat.shape[-2:] == (LATENT_SIZE, LATENT_SIZE)


@pytest.mark.parametrize("name", ["inpainting", "sdxl_inpainting", "sdxl_refiner"])
def test_other_tasks_say_so_in_their_index(name, tiny_model):
    index = json.loads(Path(tiny_model(name), "model_index.json").read_text())
    assert index["_class_name"].removesuffix("Pipeline").endswith(("Inpaint", "Img2Img"))


def test_t5s_tokenizer_splits_unknown_words_into_letters():
    tokenizer = t5_tokenizer(length=8)
    assert tokenizer.tokenize("a cat") == ["▁a", "▁cat"]
    assert tokenizer.tokenize("xyz") == ["▁", "x", "y", "z"]
    ids = tokenizer("a cat", padding="max_length").input_ids
    assert ids[2:] == [tokenizer.eos_token_id, *[tokenizer.pad_token_id] * 5]
