"""LoRA adapters: loaded from beside a model, created, used beside others of the user's, and saved."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import constants, errors
from one_sentence import refused
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_run import build_pipeline

from ddpo_fast import DefaultDDPOStableDiffusionPipeline, lora
from ddpo_fast.lora import LORA_WEIGHTS


def write_adapter(folder: Path, text: bool = False, rank: int = 8, alpha: int = 6, **settings) -> Path:
    """Writes an adapter with random weights beside a model, as another program does."""
    pipe = build_pipeline()
    torch.manual_seed(3)
    written = {}
    targets = {"unet": ["to_q", "to_v"], "text_encoder": ["q_proj", "v_proj"]}
    for part in ("unet", "text_encoder") if text else ("unet",):
        network = getattr(pipe, part)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets[part], init_lora_weights=False, **settings)
        network.add_adapter(config)
        written[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
        written[f"{part}_lora_adapter_metadata"] = {**config.to_dict(), "target_modules": targets[part]}
    pipe.save_lora_weights(folder, **written)
    return folder / LORA_WEIGHTS


@pytest.fixture
def model(model_dir, tmp_path) -> Path:
    """A copy of the random pipeline's folder."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def unet_output(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor(500), text).sample


def reopened(folder: Path) -> StableDiffusionPipeline:
    """A model and the adapter beside it, as diffusers loads them."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(folder, weight_name=LORA_WEIGHTS)
    return pipe


@pytest.mark.parametrize("text", [False, True])
def test_an_adapter_beside_the_model_is_trained_further(make_trainer, model, tmp_path, text):
    write_adapter(model, text)
    given = reopened(model)
    trainer = make_trainer(model=str(model), use_lora=True, num_epochs=1, sample_num_steps=2)
    assert torch.equal(trainer.policy.embed_prompts(["a cat"])[1], given.encode_prompt("a cat", "cpu", 1, False)[0])
    trainer.train()
    trainer.save_model()
    final = reopened(tmp_path / "run" / "final")
    assert torch.equal(final.encode_prompt("a cat", "cpu", 1, False)[0], trainer.policy.embed_prompts(["a cat"])[1])
    # fused layers compute in another order: a few roundings of values near 1
    torch.testing.assert_close(unet_output(final.unet), unet_output(trainer.sd_pipeline.unet), rtol=0, atol=1e-5)
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (recorded["lora_rank"], recorded["lora_alpha"]) == (8, 6)
    assert recorded["lora_target_modules"] == ["to_q", "to_v"]
    assert recorded["pretrained_model"] == str(model)
    # the options of a resumed run
    DefaultDDPOStableDiffusionPipeline(str(model), lora_rank=8, lora_alpha=6, lora_target_modules=["to_q", "to_v"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_lora": False}, "use_lora is False"),
        ({"lora_rank": 16}, "lora_rank is 16, .* has 8"),
        ({"lora_alpha": 2}, "lora_alpha is 2, .* has 6"),
        ({"lora_target_modules": ("to_k",)}, "lora_target_modules is to_k, .* has to_q,to_v"),
    ],
)
def test_options_that_contradict_the_adapter_are_refused(model, options, words):
    write_adapter(model)
    with pytest.raises(ValueError, match=words):
        DefaultDDPOStableDiffusionPipeline(str(model), **options)


def test_a_truncated_adapter_is_refused(model):
    path = write_adapter(model)
    path.write_bytes(path.read_bytes()[:-100])
    with refused(OSError, LORA_WEIGHTS):
        DefaultDDPOStableDiffusionPipeline(str(model))


@pytest.mark.parametrize("name", ["x", "transformer.blocks.0.attn.to_q.lora_A.weight"])
def test_an_adapter_for_another_kind_of_model_is_refused(model, name):
    save_file({name: torch.zeros(2, 2)}, model / LORA_WEIGHTS)
    with pytest.raises(OSError, match=r"nothing in it is for this kind of model .*; copy it again .*"):
        DefaultDDPOStableDiffusionPipeline(str(model))


def test_an_adapter_that_is_a_pickle_is_refused(model):
    (model / "pytorch_lora_weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_lora_weights\.bin, a pickle"):
        DefaultDDPOStableDiffusionPipeline(str(model))


class Answer:
    """A response of the Hub, with the attributes that its errors read."""

    headers: dict = {}
    request = None
    status_code = 404


def test_only_the_hubs_own_answer_means_that_there_is_no_adapter(monkeypatch, tmp_path):
    def fail_with(error):
        def download(*args, **kwargs):
            raise error

        monkeypatch.setattr(lora, "hf_hub_download", download)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    fail_with(errors.RemoteEntryNotFoundError("404", response=Answer()))
    assert lora.find_adapter("somebody/model") is None
    for error, words in (
        (errors.LocalEntryNotFoundError("offline"), "may have an adapter"),
        (errors.HfHubHTTPError("503", response=Answer()), "neither be reached"),
        (errors.GatedRepoError("401", response=Answer()), "gated"),
        (PermissionError("cache"), "neither be reached"),
    ):
        fail_with(error)
        with pytest.raises(OSError, match=words):
            lora.find_adapter("somebody/model")


def test_the_cache_knows_that_the_hub_has_no_adapter(monkeypatch):
    files = [type("File", (), {"path": "unet/config.json"})]
    monkeypatch.setattr("huggingface_hub.get_cached_repo_tree", lambda *args, **kwargs: files)
    assert lora.find_adapter("somebody/model") is None
    files.append(type("File", (), {"path": LORA_WEIGHTS}))
    with pytest.raises(OSError, match="may have an adapter"):
        lora.find_adapter("somebody/model")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_target_modules": ["to_q", "to_z"]}, "'to_z', and the network has no such layer"),
        ({"lora_target_modules": ["attn1"]}, "'attn1', a Attention"),
        ({"lora_target_modules": []}, "names no layer"),
        ({"lora_rank": 10**6}, "lora_rank is 1000000"),
    ],
)
def test_bad_options_of_an_adapter_are_refused(model_dir, options, words):
    with refused(ValueError, words):
        DefaultDDPOStableDiffusionPipeline(model_dir, **options)


def test_an_adapter_of_convolutions_is_saved_and_resumed(make_trainer, model_dir, tmp_path):
    def run(**settings):
        pipeline = DefaultDDPOStableDiffusionPipeline(model_dir, lora_target_modules=["conv1", "to_q"])
        return make_trainer(pipeline=pipeline, num_epochs=1, sample_num_steps=2, **settings)

    trainer = run()
    trainer.train()
    trainer.save_model()
    again = run(resume_from=str(tmp_path / "run"))
    for (name, was), (_, now) in zip(
        trainer.sd_pipeline.unet.named_parameters(), again.sd_pipeline.unet.named_parameters(), strict=True
    ):
        assert torch.equal(was, now), name
    final = reopened(tmp_path / "run" / "final")
    torch.testing.assert_close(unet_output(final.unet), unet_output(trainer.sd_pipeline.unet), rtol=0, atol=1e-5)


def test_an_adapter_with_another_scale_is_refused(model_dir, tmp_path):
    first, second = (DefaultDDPOStableDiffusionPipeline(model_dir, lora_alpha=alpha) for alpha in (4, 16))
    first.save_checkpoint([first.get_trainable_layers()], [], tmp_path)
    with pytest.raises(ValueError, match="its lora_alpha is 4, and this run's is 16"):
        second.load_checkpoint([second.get_trainable_layers()], tmp_path)


@pytest.mark.parametrize("text", [False, True])
def test_another_adapter_of_the_user_stays_active(make_trainer, model_dir, tmp_path, text):
    (tmp_path / "style").mkdir()
    write_adapter(tmp_path / "style", text)
    pipeline = DefaultDDPOStableDiffusionPipeline(model_dir)
    pipeline.sd_pipeline.load_lora_weights(tmp_path / "style", weight_name=LORA_WEIGHTS, adapter_name="style")
    pipeline.sd_pipeline.set_adapters(["style"], [0.5])
    styled, prompt = unet_output(pipeline.unet), pipeline.sd_pipeline.encode_prompt("a cat", "cpu", 1, False)[0]
    trainer = make_trainer(pipeline=pipeline, num_epochs=1, sample_num_steps=2)
    # A new adapter changes no output yet, except for the rounding of the sums in fused layers.
    torch.testing.assert_close(unet_output(pipeline.unet), styled, rtol=0, atol=5e-6)
    assert torch.equal(trainer.policy.embed_prompts(["a cat"])[1], prompt)
    trained = {name for name, p in pipeline.unet.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)
    before = {name: p.clone() for name, p in pipeline.unet.named_parameters() if ".style." in name}
    trainer.train()
    assert all(torch.equal(p, pipeline.unet.get_parameter(name)) for name, p in before.items())
    trainer.save_model()
    final = reopened(tmp_path / "run" / "final")
    torch.testing.assert_close(unet_output(final.unet), unet_output(pipeline.unet), rtol=0, atol=1e-5)
    torch.testing.assert_close(final.encode_prompt("a cat", "cpu", 1, False)[0], prompt, rtol=0, atol=1e-5)


def test_full_finetuning_below_an_adapter_is_refused(make_trainer, model_dir, tmp_path):
    (tmp_path / "style").mkdir()
    write_adapter(tmp_path / "style")
    pipeline = DefaultDDPOStableDiffusionPipeline(model_dir, use_lora=False)
    pipeline.sd_pipeline.load_lora_weights(tmp_path / "style", weight_name=LORA_WEIGHTS)
    with pytest.raises(ValueError, match="use_lora is False: fuse it first"):
        pipeline.get_trainable_layers()
    pipeline.sd_pipeline.fuse_lora()
    pipeline.sd_pipeline.unload_lora_weights()
    assert all("lora" not in name for name, _ in pipeline.get_trainable_layers().named_parameters())


def test_equal_runs_write_equal_files(model_dir, tmp_path):
    """The order of a set of strings, and of safetensors' metadata, differs between processes."""
    pipeline = DefaultDDPOStableDiffusionPipeline(model_dir)
    layers = pipeline.get_trainable_layers()
    written = set()
    for number in range(8):
        # the same layers in another order
        targets = sorted(lora.TRL_TARGETS, reverse=number % 2 == 1)
        layers.peft_config["default"].target_modules = set(targets)
        (tmp_path / f"{number}").mkdir()
        pipeline.save_checkpoint([layers], [], tmp_path / f"{number}")
        written.add((tmp_path / f"{number}" / LORA_WEIGHTS).read_bytes())
    assert len(written) == 1
    metadata = json.loads(safe_open(tmp_path / "0" / LORA_WEIGHTS, "pt").metadata()["lora_adapter_metadata"])
    assert metadata["unet.target_modules"] == sorted(lora.TRL_TARGETS)


@pytest.mark.parametrize("use_lora", [False, True])
def test_files_of_weights_have_the_mode_of_other_files(model_dir, tmp_path, use_lora):
    pipeline = DefaultDDPOStableDiffusionPipeline(model_dir, use_lora=use_lora)
    layers = pipeline.get_trainable_layers()
    (tmp_path / "checkpoint").mkdir()
    before = os.umask(0o027)
    try:
        pipeline.save_pretrained(tmp_path / "final")
        pipeline.save_checkpoint([layers], [], tmp_path / "checkpoint")
    finally:
        os.umask(before)
    written = [*tmp_path.glob("final/**/*"), *tmp_path.glob("checkpoint/**/*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written if path.is_file()} == {0o640}
    assert any(path.suffix == ".safetensors" for path in written)
