"""Predicted memory of each family: against what small models take here, and of published models at full size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from one_sentence import refused
from peft import LoraConfig
from tiny_models import save

from ddpo_fast import DDPOConfig, cli, prompt_embeddings
from ddpo_fast.device_memory import GB
from ddpo_fast.families import family_of_pipeline
from ddpo_fast.model_configs import check_model
from ddpo_fast.offload_frozen import leave_as_loaded
from ddpo_fast.plan import MARGIN, choose, live_bytes, phases, predict
from ddpo_fast.plan.candidates import with_settings
from ddpo_fast.plan.footprint import Adapter, Footprint
from ddpo_fast.prompt_embeddings import ENCODED_AT_ONCE, PromptEmbeddings
from ddpo_fast.unet import faster_layers, fuse_unet

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from lib import random_families
from lib.call_costs import peak_bytes

FAMILIES = ("sdxl", "sd35", "flux_dev")
ROWS = 4
# settings that leave a plan nothing else to choose
SMALL = {
    "train_micro_batch_size": 1,
    "sample_merge_batches": 1,
    "gradient_checkpointing": "blocks",
    "train_use_8bit_adam": True,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("families")
    return {name: save(name, folder / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("published")
    return {name: str(random_families.save_configs(name, folder / name)) for name in random_families.FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_predicted_against_measured(folders, name):
    """A forward and a backward pass over an adapter, and a prompt's embedding."""
    footprint = Footprint(check_model(folders[name]), Adapter(4), torch.float32, "cpu", steps=4)
    family = family_of_pipeline(DiffusionPipeline.from_pretrained(folders[name]))
    with torch.no_grad():
        _, embeds = family.encode(["a cat"], torch.device("cpu"))
    assert embeds.shape[1:] == footprint.embedding_shape
    assert family.latent_shape == footprint.latent_shape
    assert footprint.text_bytes == sum(
        tensor.nbytes for part in family.text_encoders.values() for tensor in (*part.parameters(), *part.buffers())
    )

    network = family.denoiser.requires_grad_(False).train()
    network.add_adapter(LoraConfig(r=4, target_modules=list(family.targets)))
    fuse_unet(network.to(memory_format=torch.channels_last), faster_layers("cpu"))
    assert footprint.trained_weights == sum(p.numel() for p in network.parameters() if p.requires_grad)
    family.set_steps(4, "cpu")

    def passes() -> None:
        latents = torch.randn(ROWS, *family.latent_shape)
        output = family.call(latents, family.keys[:1].repeat(ROWS), embeds.repeat(ROWS, 1, 1))
        torch.autograd.backward(output, torch.ones_like(output))
        for parameter in network.parameters():
            parameter.grad = None

    passes()
    # the same within a tenth: ops allocate workspaces inside, and adding up gradients is counted as it is in training
    assert footprint.training().peak(ROWS) == pytest.approx(peak_bytes(passes, "cpu"), rel=0.1)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("name", ["sd35", "flux_dev"])
def test_prompts_predicted_against_measured(folders, name, elsewhere):
    """T5 adds biases of positions to its scores, and no kernel of that attention stores the scores of all prompts.

    Text encoders that are not kept in the precision that they compute in pass block by block.
    """
    footprint = Footprint(check_model(folders[name]), Adapter(4), torch.float32, "cpu", steps=4)
    family = family_of_pipeline(DiffusionPipeline.from_pretrained(folders[name]))
    if elsewhere:
        for encoder in family.text_encoders.values():
            leave_as_loaded(encoder.half(), torch.float32)
    encode = torch.no_grad()(lambda: family.encode(["a cat"] * ENCODED_AT_ONCE, torch.device("cpu")))
    encode()
    predicted = footprint.encoding + elsewhere * footprint.passing_text_bytes
    assert predicted == pytest.approx(peak_bytes(encode, "cpu"), rel=0.1)
    assert footprint.passing_text_bytes < 0.9 * footprint.text_bytes


@pytest.mark.parametrize("name", FAMILIES)
def test_kept_prompts_predicted_against_measured(folders, name, monkeypatch):
    """To the byte, also beyond the limit, above which those of earlier epochs make room for the next epoch's."""
    footprint = Footprint(check_model(folders[name]), Adapter(4), torch.float32, "cpu", steps=4)
    family = family_of_pipeline(DiffusionPipeline.from_pretrained(folders[name]))
    for encoder in family.text_encoders.values():
        encoder.requires_grad_(False)
    embed = PromptEmbeddings(family, torch.device("cpu"), remembers=True)
    embed.negative(None)
    config = DDPOConfig(mixed_precision="no", sample_num_steps=4, sample_batch_size=4, sample_num_batches_per_epoch=2)
    monkeypatch.setattr(footprint, "prompts", 12)

    def predicted() -> int:
        return phases._kept_prompt_bytes(footprint, config)

    cats = [f"cat {i}" for i in range(12)]
    embed.keep(cats[:8])
    embed.keep(cats[4:])
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for kept in embed._known.values() for t in kept
    }
    assert predicted() == sum(held.values()) == embed.kept_bytes == 13 * footprint.prompt_bytes
    for module in (prompt_embeddings, phases):
        monkeypatch.setattr(module, "MOST_KEPT", 3 * footprint.prompt_bytes)
    assert predicted() == 12 * footprint.prompt_bytes
    embed.keep(cats[:8])
    assert embed.kept_bytes == 13 * footprint.prompt_bytes, "all were known"
    embed.keep(["dog", *cats[:7]])
    assert embed.kept_bytes == 8 * footprint.prompt_bytes
    embed.keep(["bird", "dog"])
    assert embed.kept_bytes == 2 * footprint.prompt_bytes


@pytest.mark.parametrize(("name", "rows"), [("sd35", 2), ("flux_dev", 1)])
def test_guidance_doubles_the_rows_unless_the_network_takes_its_scale(folders, name, rows):
    footprint = Footprint(check_model(folders[name]), Adapter(4), torch.float32, "cpu", steps=4)
    settings = {"mixed_precision": "no", "sample_num_steps": 4, "sample_batch_size": 4, "train_batch_size": 4}
    plain, guided = (
        predict(footprint, DDPOConfig(**settings, train_micro_batch_size=4, sample_guidance_scale=scale)).phases
        for scale in (1.0, 5.0)
    )
    more = guided["training"]["activations, buffers"] - plain["training"]["activations, buffers"]
    assert more == footprint.training().peak(4 * rows) - footprint.training().peak(4)


def test_a_dry_run_counts_as_the_model_is_trained(folders, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    options = "--num_epochs 1 --sample_num_steps 4 --sample_batch_size 2 --sample_num_batches_per_epoch 1 --height 16"
    options += " --width 16 --train_batch_size 2 --sample_group_size 1 --mixed_precision no --train_micro_batch_size 2"
    options += f" --prompts {tmp_path}/prompts.txt --output_dir {tmp_path}/run --pretrained_model {folders['flux_dev']}"
    cli.main(["train", *options.split(), "--reward", "jpeg_compressibility", "--dry_run"])
    # the last of the 4 steps has no noise
    assert "6 (image, timestep) pairs per update (2 images x 3 timesteps)" in capsys.readouterr().out


def test_calls_alike_are_counted_as_they_were_computed(folders, monkeypatch):
    """Shapes are computed for the first of calls alike only; to the byte as if for each."""
    configs = check_model(folders["sdxl"])
    kept, computed = (Footprint(configs, Adapter(4), torch.float32, "cpu", steps=4) for _ in range(2))
    fast = kept.training("blocks")
    monkeypatch.setattr(live_bytes, "_called", lambda func, args, kwargs: func(*args, **kwargs))
    slow = computed.training("blocks")
    assert (fast.fixed == slow.fixed).all()
    assert (fast.per_row == slow.per_row).all()


def test_weights_that_do_not_fit_are_refused_before_anything_is_traced(published, monkeypatch):
    configs = check_model(published["flux.1-dev"], has_weights=False)
    monkeypatch.setattr(Footprint, "training", None)
    monkeypatch.setattr(Footprint, "decoding", None)
    with refused(ValueError, "training all weights needs at least .* alone, and there are 24: .* or train a LoRA"):
        choose(Footprint(configs, None, torch.bfloat16), DDPOConfig(mixed_precision="bf16"), 24 * GB)
    with refused(ValueError, "training a LoRA needs at least .*--quantize_frozen 8bit or 4bit"):
        choose(Footprint(configs, Adapter(16), torch.bfloat16), DDPOConfig(mixed_precision="bf16"), 24 * GB)


def test_prompts_are_embedded_once_where_the_text_encoders_do_not_fit_beside(folders):
    """That changes no result, unlike quantized weights, which are only named in the message."""
    footprint = Footprint(check_model(folders["sd35"]), Adapter(4), torch.float32, "cpu", steps=4, prompts=2)
    config = with_settings(DDPOConfig(mixed_precision="no", sample_num_steps=4, sample_batch_size=8), SMALL)
    whole, once = (predict(footprint, with_settings(config, extra)) for extra in ({}, {"embed_prompts_once": True}))
    assert once.peak < whole.peak
    choice = choose(footprint, config, (whole.peak + once.peak) / 2 / (1 - MARGIN))
    assert choice.settings == {"embed_prompts_once": True}


@pytest.mark.parametrize(
    ("name", "network", "text", "shape"),
    [
        ("sdxl", 2_567_463_684, 123_060_480 + 694_659_840, (78, 2048)),
        ("sd3.5-medium", 2_243_171_520, 123_650_304 + 694_659_840 + 4_762_310_656, (334, 4096)),
        ("flux.1-dev", 11_901_408_320, 123_060_480 + 4_762_310_656, (513, 4096)),
    ],
)
def test_published_models(published, name, network, text, shape):
    """Their weights, as their files have them, and the rows of a prompt."""
    footprint = Footprint(check_model(published[name], has_weights=False), Adapter(16), torch.bfloat16)
    # SD3 keeps its positions, 384 x 384 of 1536 elements, in a buffer of fp32
    positions = 4 * 384 * 384 * 1536 if name == "sd3.5-medium" else 0
    assert footprint.frozen_bytes == pytest.approx(2 * network + positions, rel=1e-3)
    assert footprint.text_bytes == pytest.approx(2 * text, rel=1e-3)
    assert footprint.embedding_shape == shape


def test_images_of_another_size(published):
    configs = check_model(published["sdxl"], has_weights=False)
    wide = Footprint(configs, Adapter(), torch.bfloat16, size=(768, 1344))
    assert wide.latent_shape == (4, 96, 168)
    # the VAE computes in fp32, whose images in fp16 are black
    assert wide.image_bytes == 4 * 3 * 768 * 1344
