"""Models are loaded as they are stored, from any set of files that holds them whole, and trained in fp32."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import build_pipeline, build_trainer

from ddpo_fast import DefaultDDPOStableDiffusionPipeline
from ddpo_fast.lora import LORA_WEIGHTS
from ddpo_fast.model_configs import check_model, variant_of, weight_files
from ddpo_fast.run_folder.resume_checks import base_digest
from ddpo_fast.safetensors_header import stored_dtype
from ddpo_fast.tiny_sd import MODEL


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, Path]:
    """The folders of one model: 'half', stored in fp16, and 'single', the same values in fp32."""
    folder = tmp_path_factory.mktemp("stored")
    pipeline = build_pipeline(widths=(8, 16)).to(torch.float16)
    pipeline.save_pretrained(folder / "half")
    pipeline.to(torch.float32).save_pretrained(folder / "single")
    return {name: folder / name for name in ("half", "single")}


def networks(pipeline) -> list[torch.nn.Module]:
    return [pipeline.unet, pipeline.vae, pipeline.text_encoder]


def test_a_model_is_loaded_as_it_is_stored_and_mapped_from_its_files(stored):
    pipeline = DefaultDDPOStableDiffusionPipeline(str(stored["half"]))
    weights = [p for network in networks(pipeline) for name, p in network.named_parameters() if "lora_" not in name]
    assert {p.dtype for p in weights} == {torch.float16}
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(stored["half"]) in line
    ]
    assert all(any(p.data_ptr() in part for part in mapped) for p in weights)


@pytest.mark.parametrize("use_lora", [True, False])
def test_half_precision_files_train_in_fp32_as_the_same_values_do(stored, use_lora, tmp_path):
    weights = []
    for name, folder in stored.items():
        trainer = build_trainer(folder, tmp_path / name, use_lora=use_lora, num_epochs=1, sample_num_steps=2)
        assert {p.dtype for network in networks(trainer.sd_pipeline) for p in network.parameters()} == {torch.float32}
        trainer.train()
        weights.append([p for p in trainer.sd_pipeline.unet.parameters() if p.requires_grad])
    assert weights[0]
    assert all(torch.equal(half, single) for half, single in zip(*weights, strict=True))


def test_the_digest_of_a_model_does_not_depend_on_how_it_is_stored(stored):
    half, single = (DefaultDDPOStableDiffusionPipeline(str(folder)) for folder in stored.values())
    assert base_digest(half) == base_digest(single) != ""
    # rounded weights would be those of another model
    half.vae.to(torch.bfloat16)
    assert base_digest(half) == ""


def test_an_adapter_beside_half_precision_weights_is_not_rounded(stored, tmp_path):
    first = DefaultDDPOStableDiffusionPipeline(str(stored["half"]))
    trained = [p for p in first.get_trainable_layers().parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.normal_()
    first.save_pretrained(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / LORA_WEIGHTS).values()} == {torch.float32}
    second = DefaultDDPOStableDiffusionPipeline(str(tmp_path)).get_trainable_layers()
    again = [p for p in second.parameters() if p.requires_grad]
    assert all(torch.equal(*pair) for pair in zip(trained, again, strict=True))
    assert second.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("dtypes", "holds_all"),
    [
        ([torch.float16, torch.float16], torch.float16),
        ([torch.bfloat16, torch.int64], torch.bfloat16),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float8_e4m3fn], torch.bfloat16),
    ],
)
def test_the_precision_of_a_part_holds_all_its_numbers(dtypes, holds_all, tmp_path):
    save_file({str(i): torch.zeros(2, dtype=dtype) for i, dtype in enumerate(dtypes)}, tmp_path / "x.safetensors")
    assert stored_dtype([tmp_path / "x.safetensors"]) == holds_all


# which files

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.mark.parametrize(
    ("endings", "variant"),
    [
        ({"unet": [""], "vae": [""], "text_encoder": [""]}, None),
        ({"unet": [".fp16"], "vae": [".fp16"], "text_encoder": [".fp16"]}, "fp16"),
        # only one part has it
        ({"unet": [".fp16"], "vae": [""], "text_encoder": ["", ".fp16"]}, "fp16"),
        ({"unet": ["", ".fp16"], "vae": [".fp16"], "text_encoder": [""]}, "fp16"),
        # the first that is whole
        ({part: [".fp16", ".bf16"] for part in STEMS}, "bf16"),
        ({"unet": [".bf16", ".fp16"], "vae": [".fp16"], "text_encoder": [".fp16"]}, "fp16"),
        ({"unet": [".fp16", ".ema"], "vae": [".fp16"], "text_encoder": [".fp16"]}, "fp16"),
        # split
        ({"unet": [".fp16-00001-of-00002", ".fp16-00002-of-00002"], "vae": [""], "text_encoder": [""]}, "fp16"),
        ({"unet": ["-00001-of-00002", ".fp16"], "vae": [""], "text_encoder": [""]}, "fp16"),
    ],
)
def test_the_variant_that_all_parts_can_be_loaded_from(endings, variant, tmp_path):
    for part, stem in STEMS.items():
        (tmp_path / part).mkdir()
        for ending in endings[part]:
            (tmp_path / part / f"{stem}{ending}.safetensors").write_bytes(b"")
    assert variant_of(tmp_path, ("unet", "vae", "text_encoder")) == variant
    assert all(weight_files(tmp_path, part, variant) for part in STEMS)


@pytest.mark.parametrize("missing", [1, 2])
def test_weights_of_which_a_file_is_missing_are_refused(missing, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name(f"diffusion_pytorch_model-0000{3 - missing}-of-00002.safetensors"))
    with pytest.raises(ValueError, match="it has no unet/"):
        check_model(str(tmp_path / "model"))


def test_split_files_of_a_variant_are_loaded(stored, tmp_path):
    shutil.copytree(stored["half"], tmp_path / "model")
    pipeline = DefaultDDPOStableDiffusionPipeline(str(stored["half"]), use_lora=False)
    shutil.rmtree(tmp_path / "model" / "unet")
    pipeline.unet.save_pretrained(tmp_path / "model" / "unet", variant="fp16", max_shard_size="100KB")
    assert len(list((tmp_path / "model" / "unet").glob("*.safetensors"))) > 1
    again = DefaultDDPOStableDiffusionPipeline(str(tmp_path / "model"), use_lora=False)
    assert again.unet.dtype == torch.float16
    assert all(torch.equal(*pair) for pair in zip(pipeline.unet.parameters(), again.unet.parameters(), strict=True))
