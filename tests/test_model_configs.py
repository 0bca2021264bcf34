"""What is read from a model's configs, and models that cannot be trained: refused before any weight is read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from one_sentence import error_of_command, refused
from safetensors.torch import save_file

from ddpo_fast import DefaultDDPOStableDiffusionPipeline
from ddpo_fast.model_configs import check_model
from ddpo_fast.tiny_sd import MODEL

UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"


@pytest.fixture
def folder(tmp_path) -> Path:
    """The bundled model's configs with files of weights that cannot be read."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        (model / f"{name}.safetensors").write_bytes(b"")
    return model


def change(folder: Path, file: str, **values) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_is_read_from_the_configs():
    configs = check_model("")
    size = json.loads((MODEL / UNET).read_text())["sample_size"]
    assert configs.latent_shape == (4, size, size)
    assert configs.image_size == (4 * size, 4 * size)
    assert configs.sampling_scheduler.config.prediction_type == "epsilon"


def test_images_need_not_be_square(folder):
    change(folder, UNET, sample_size=[8, 12])
    assert check_model(str(folder)).image_size == (32, 48)


def test_a_size_of_diffusers_before_0_9_is_repaired_as_diffusers_does(folder):
    change(folder, UNET, sample_size=32, _diffusers_version="0.6.0")
    assert check_model(str(folder)).latent_shape == (4, 64, 64)


OTHER_KINDS = {
    "Stable Diffusion XL": (
        INDEX,
        {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
        "StableDiffusionXLPipeline, which has no tokenizer_2",
    ),
    "SD3": (
        INDEX,
        {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]},
        "StableDiffusion3Pipeline, which has unet",
    ),
    "ControlNet": (INDEX, {"controlnet": ["diffusers", "ControlNetModel"]}, "has controlnet"),
    "refiner": (INDEX, {"text_encoder": [None, None], "tokenizer": [None, None]}, "has no text_encoder and tokenizer"),
    "no scheduler": (INDEX, {"scheduler": [None, None]}, "has no scheduler"),
    "other text": (INDEX, {"text_encoder": ["transformers", "T5EncoderModel"]}, "transformers.T5EncoderModel"),
    "other VAE": (INDEX, {"vae": ["diffusers", "AutoencoderTiny"]}, "diffusers.AutoencoderTiny"),
    "video": (INDEX, {"unet": ["diffusers", "UNet3DConditionModel"]}, "diffusers.UNet3DConditionModel"),
    "own pipeline": (INDEX, {"_class_name": ["pipeline", "Mine"]}, r"\['pipeline', 'Mine'\]"),
    "own encoder": (INDEX, {"image_encoder": ["my_encoder", "Mine"]}, r"my_encoder\.Mine"),
    "broken settings": ("vae/config.json", {"block_out_channels": 3}, "its configs are broken"),
    "own code": (INDEX, {"unet": ["my_unet", "UNet2DConditionModel"]}, "my_unet.UNet2DConditionModel"),
    "inpainting": (UNET, {"in_channels": 9}, "9 channels and gives 4, as one for inpainting"),
    "InstructPix2Pix": (UNET, {"in_channels": 8}, "8 channels"),
    "learned variance": (UNET, {"out_channels": 8}, "4 channels and gives 8"),
    "wide latents": (UNET, {"in_channels": 16, "out_channels": 16}, "its VAE gives 4"),
    "LCM": (UNET, {"time_cond_proj_dim": 256}, "latent consistency"),
    "class labels": (UNET, {"num_class_embeds": 10}, "class labels"),
    "added embedding": (UNET, {"addition_embed_type": "text_time"}, "addition_embed_type"),
    "other width": (UNET, {"cross_attention_dim": 768}, "text of width 768"),
    "widths": (UNET, {"cross_attention_dim": [64, 768]}, "text of width 768"),
    "no size": (UNET, {"sample_size": None}, "sample_size is None"),
    "odd size": (UNET, {"sample_size": [8, 8, 8]}, r"sample_size is \[8, 8, 8\]"),
    "other class": (UNET, {"_class_name": "UNet2DModel"}, "'UNet2DModel'"),
    "zero SNR": (SCHEDULER, {"rescale_betas_zero_snr": True}, "zero terminal SNR"),
    "flow": (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
    "endless tokens": ("tokenizer/tokenizer_config.json", {"model_max_length": 1e30}, "model_max_length"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_model_are_refused(folder, kind):
    file, values, words = OTHER_KINDS[kind]
    change(folder, file, **values)
    with refused(ValueError, words, str(folder)):
        check_model(str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_missing_is_named(folder, part):
    shutil.rmtree(folder / part)
    for has_weights in (True, False):
        with pytest.raises(ValueError, match=f"has no (folder )?{part}"):
            check_model(str(folder), has_weights=has_weights)


@pytest.mark.parametrize("file", [INDEX, UNET, SCHEDULER, "text_encoder/config.json", "vae/config.json"])
@pytest.mark.parametrize("text", [b'{"a": ', b"[]", b"\xff\xfe{", b""])
def test_a_config_that_is_broken_is_named(folder, file, text):
    (folder / file).write_bytes(text)
    with refused(OSError, file):
        check_model(str(folder))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("vae/config.json", {"scaling_factor": None}, "scaling_factor is None but must be a number above 0"),
        ("vae/config.json", {"scaling_factor": "1"}, "scaling_factor is '1' but must be a number above 0"),
        (UNET, {"sample_size": 7}, "its images are 28 x 28, which 8 does not divide"),
    ],
)
def test_image_sizes_that_cannot_be_decoded_are_refused(folder, file, values, words):
    change(folder, file, **values)
    with pytest.raises(ValueError, match=words):
        check_model(str(folder))


def test_weights_that_are_a_pickle_are_refused_with_the_remedy(folder):
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    for has_weights in (True, False):
        with pytest.raises(ValueError, match=r"text_encoder/pytorch_model.bin, a pickle.*save_pretrained") as caught:
            check_model(str(folder), has_weights=has_weights)
        assert "weights_only" not in str(caught.value)


def test_missing_weights_are_refused(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    check_model(str(folder), has_weights=False)
    with pytest.raises(ValueError, match=r"no vae/diffusion_pytorch_model.safetensors"):
        check_model(str(folder))


def test_a_tokenizer_without_a_vocabulary_is_refused(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json nor vocab\.json"):
        check_model(str(folder))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody/here", "neither be reached nor is it in the cache"),
        ("a/b/c", "no folder here"),
        ("./nowhere", "no such folder"),
        ("~/no such folder", "no such folder"),
    ],
)
def test_models_that_do_not_exist_are_refused(name, words, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with refused((OSError, ValueError), words):
        check_model(name)


def test_a_part_of_a_model_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="one part of a pipeline"):
        check_model(str(folder / "unet"))
    with refused(ValueError, "one part of a pipeline in diffusers' layout"):
        save_file({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(2)}, tmp_path / "unet.safetensors")
        check_model(str(tmp_path / "unet.safetensors"))


@pytest.mark.parametrize("steps", [1000, 1001])
def test_more_steps_than_the_model_has_are_refused(steps):
    check_model("", steps=999)
    with pytest.raises(ValueError, match=f"{steps} sampling steps"):
        check_model("", steps=steps)


@pytest.mark.parametrize("command", ["train", "plan", "api"])
@pytest.mark.parametrize("kind", ["Stable Diffusion XL", "inpainting", "LCM", "steps"])
def test_every_entry_point_refuses_before_weights_are_read(folder, command, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, values, words = OTHER_KINDS.get(kind, (INDEX, {}, "1001 sampling steps"))
    change(folder, file, **values)
    options = ["--sample_num_steps", "1001"] if kind == "steps" else []
    if command == "api":
        if kind == "steps":
            pytest.skip("a pipeline does not know the number of steps")
        with pytest.raises(ValueError, match=words):
            DefaultDDPOStableDiffusionPipeline(str(folder))
    else:
        options += ["--gpu_memory", "8"] if command == "plan" else ["--output_dir", "run"]
        assert re.search(words, error_of_command([command, "--pretrained_model", str(folder), *options]))
    assert not (tmp_path / "run").exists()


def test_a_scheduler_changed_afterwards_is_refused_at_the_start(make_trainer, model_dir, tmp_path):
    from diffusers import EulerDiscreteScheduler

    pipeline = DefaultDDPOStableDiffusionPipeline(model_dir)
    pipeline.sd_pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler"):
        make_trainer(pipeline=pipeline)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler"):
        pipeline(prompt="a cat", num_inference_steps=2)
    assert not (tmp_path / "run").exists()


def test_training_on_images_that_are_not_square(make_trainer, model_dir, tmp_path):
    wide = tmp_path / "wide"
    shutil.copytree(model_dir, wide)
    change(wide, UNET, sample_size=[4, 8])
    shapes = []

    def reward(images, prompts, metadata):
        shapes.append(tuple(images.shape[1:]))
        return images.float().mean((1, 2, 3)), {}

    trainer = make_trainer(model=str(wide), reward=reward, num_epochs=1, sample_num_steps=2)
    trainer.train()
    trainer.evaluate(("a cat",), ({},))
    assert set(shapes) == {(3, 8, 16)}
