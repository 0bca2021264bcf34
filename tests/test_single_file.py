"""Models in one file are those of the same weights in a diffusers folder, and all others are refused by their names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import original_layout
import pytest
import tiny_models
import torch
from compare_runs import same_bits, trained_weights
from one_sentence import error_of_command, refused
from safetensors.torch import load_file, save_file
from tiny_run import build_pipeline, build_trainer

from ddpo_fast import DefaultDDPOStableDiffusionPipeline, cli
from ddpo_fast.model_configs import check_model, family_of_model

WEIGHTS = ("*.safetensors", "*.bin")
MODELS = {
    "sd1": lambda: build_pipeline(widths=(8, 16)),
    "sd2": tiny_models.sd2,
    "sdxl": tiny_models.sdxl,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, Path, Path]]:
    """By name: the diffusers folder, the file of the same weights, and the folder without weights."""
    made = {}
    for name, make in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        pipe = make()
        pipe.save_pretrained(folder / "whole")
        (folder / "files").mkdir()
        file = original_layout.save(pipe, folder / "files" / f"{name}.safetensors")
        shutil.copytree(folder / "whole", folder / "configs", ignore=shutil.ignore_patterns(*WEIGHTS))
        made[name] = folder / "whole", file, folder / "configs"
    return made


def parts_of(pipeline) -> dict[str, torch.nn.Module]:
    return {pipeline.family.network: pipeline.unet, **pipeline.family.frozen_parts}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_same_model_as_the_folder(models, name):
    folder, file, configs = models[name]
    whole = DefaultDDPOStableDiffusionPipeline(str(folder))
    single = DefaultDDPOStableDiffusionPipeline(str(file), single_file_config=str(configs))
    assert type(single.sd_pipeline) is type(whole.sd_pipeline)
    assert type(single.family) is type(whole.family) is family_of_model(str(file))
    for (part, ours), theirs in zip(parts_of(single).items(), parts_of(whole).values(), strict=True):
        expected = theirs.state_dict()
        assert {key: value.shape for key, value in ours.state_dict().items()} == {
            key: value.shape for key, value in expected.items()
        }, part
        for key, value in ours.state_dict().items():
            assert torch.equal(value, expected[key]), (part, key)
    images = []
    for pipeline in (whole, single):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(["a cat"], num_inference_steps=2, eta=1.0, generator=generator, output_type="pt").images)
    # a sum's order may follow how its terms lie in memory, which is another file's: a few roundings of values near 1
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_file_in_half_precision_trains_as_the_folder_does(models, name, tmp_path):
    """To the bit, as weights are trained in fp32; numbers that are not the model's do not change its precision."""
    configs = models[name][2]
    pipe = MODELS[name]().to(torch.float16)
    half = original_layout.save(pipe, tmp_path / "half.safetensors", betas=torch.linspace(0, 1, 3))
    pipe.to(torch.float32).save_pretrained(tmp_path / "whole")
    weights = []
    for kind, model in (("file", half), ("folder", tmp_path / "whole")):
        given = {"single_file_config": str(configs)} if kind == "file" else {}
        pipeline = DefaultDDPOStableDiffusionPipeline(str(model), **given)
        if kind == "file":
            assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float16
        torch.manual_seed(0)
        trainer = build_trainer("", tmp_path / kind, pipeline=pipeline, use_lora=True, num_epochs=1, sample_num_steps=2)
        trainer.train()
        weights.append(trained_weights(trainer))
    assert same_bits(*weights)


def test_the_command_line_trains_resumes_and_exports_a_file(models, tmp_path, monkeypatch):
    _, file, configs = models["sd1"]
    monkeypatch.chdir(file.parent)
    options = f"--output_dir {tmp_path / 'run'} --recipe trl --prompts animals --num_epochs 1 --sample_num_steps 2"
    options += f" --pretrained_model {file.name} --single_file_config ../{configs.name} --sample_batch_size 2"
    options += " --train_batch_size 2 --train_gradient_accumulation_steps 1 --sample_num_batches_per_epoch 1"
    cli.main(["train", *options.split()])
    monkeypatch.chdir(tmp_path)
    cli.main(["train", "--resume_from", str(tmp_path / "run"), "--num_epochs", "2"])
    final = tmp_path / "run" / "final"
    opened = diffusers.StableDiffusionPipeline.from_pretrained(final)
    opened.load_lora_weights(final)
    cli.main(["sample", str(tmp_path / "run"), "--num-images", "1"])
    assert (tmp_path / "run" / "samples.png").exists()


def test_configs_beside_the_file_are_found(models, tmp_path):
    _, file, configs = models["sdxl"]
    shutil.copytree(configs, tmp_path / "repository")
    inside = shutil.copy(file, tmp_path / "repository" / "model.safetensors")
    assert check_model(str(inside)).image_size == (16, 16)
    beside = shutil.copy(file, tmp_path / "model.safetensors")
    shutil.copytree(configs, tmp_path / "model")
    assert check_model(str(beside)).image_size == (16, 16)


def test_without_configs_it_is_said_where_they_may_be(models, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, words in {
        "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sd2": "does not say what its UNet predicts",
        "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    }.items():
        with refused(ValueError, words, "--single_file_config"):
            check_model(str(models[name][1]))
    with refused(ValueError, "no diffusers folder with model_index.json"):
        check_model(str(models["sd1"][1]), single_file_config=str(tmp_path))
    with refused(ValueError, "has configs of its own"):
        check_model(str(models["sd1"][0]), single_file_config=str(tmp_path))


def test_configs_of_another_model_are_refused(models, tmp_path):
    file = str(models["sd1"][1])
    with refused(ValueError, "the file is a Stable Diffusion 1.x, and these are configs of a Stable Diffusion XL"):
        check_model(file, single_file_config=str(models["sdxl"][2]))
    shutil.copytree(models["sd1"][2], tmp_path / "wider")
    for part, name in (("unet", "cross_attention_dim"), ("text_encoder", "hidden_size")):
        config = tmp_path / "wider" / part / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), name: 64}))
    with refused(ValueError, "the unet's cross_attention_dim is 64 in the configs and 32 in the file"):
        check_model(file, single_file_config=str(tmp_path / "wider"))


def test_a_file_of_v_prediction_needs_such_a_scheduler(models, tmp_path):
    weights = load_file(models["sd1"][1])
    save_file({**weights, "v_pred": torch.tensor([])}, tmp_path / "v.safetensors")
    with refused(ValueError, "predicts v, and the scheduler's config 'epsilon'"):
        check_model(str(tmp_path / "v.safetensors"), single_file_config=str(models["sd1"][2]))


OTHERS = {
    "a refiner": {"conditioner.embedders.0.model.positional_embedding": (2, 2)},
    "a FLUX": {"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (2,)},
    "a Stable Diffusion 3": {"joint_blocks.0.context_block.adaLN_modulation.1.bias": (2,)},
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0.lora_up.weight": (2, 2)},
    "one part of a pipeline in diffusers' layout": {"down_blocks.0.resnets.0.conv1.weight": (2, 2)},
    "no UNet": {"something": (2,)},
}


@pytest.mark.parametrize("words", OTHERS)
def test_other_files_are_refused_by_the_names_of_their_tensors(words, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in OTHERS[words].items()}, file)
    with refused(ValueError, words):
        check_model(str(file))
    with refused(ValueError, words):
        DefaultDDPOStableDiffusionPipeline(str(file))
    assert words in error_of_command(["train", "--pretrained_model", str(file), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3)},
            "9 channels and gives 4, as one for inpainting",
        ),
        ({"first_stage_model.decoder.conv_in.weight": None}, "no VAE"),
        ({"cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": None}, "no text encoder"),
    ],
)
def test_files_that_lack_a_part_or_are_for_another_task_are_refused(models, change, words, tmp_path):
    weights = load_file(models["sd1"][1])
    for name, shape in change.items():
        del weights[name]
        if shape is not None:
            weights[name] = torch.zeros(shape)
    save_file(weights, tmp_path / "model.safetensors")
    with refused(ValueError, words):
        check_model(str(tmp_path / "model.safetensors"), single_file_config=str(models["sd1"][2]))


def test_a_file_that_lacks_a_tensor_is_refused(models, tmp_path):
    weights = load_file(models["sd1"][1])
    del weights["model.diffusion_model.out.0.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with refused(OSError, "it lacks weights that the configs of"):
        DefaultDDPOStableDiffusionPipeline(
            str(tmp_path / "model.safetensors"), single_file_config=str(models["sd1"][2])
        )


def test_pickles_and_damaged_files_are_refused(tmp_path):
    for name, words in (("model.ckpt", "no pickle is read"), ("model.safetensors", "damaged")):
        (tmp_path / name).write_bytes(b"\0" * 20)
        with refused((OSError, ValueError), words):
            check_model(str(tmp_path / name))
