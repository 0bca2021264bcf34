"""What is uploaded to the Hub, read back from a stand-in for it, and the LoRA that other programs read."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hub_server import TOKEN, serving
from huggingface_hub import HfApi, constants
from one_sentence import refused
from safetensors.torch import load_file

from ddpo_fast import cli
from ddpo_fast.run_folder.model_card import curve_sentence, licence_of

SMALL = {"sample_num_steps": 2, "num_epochs": 1, "sample_freq": 1, "sample_num_images": 2}


@pytest.fixture
def hub(monkeypatch):
    """Starts the stand-in, with failures, and sends huggingface_hub there."""

    monkeypatch.setattr("ddpo_fast.run_folder.hub.PAUSES", (0.1, 0.1))

    def use(server):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr("ddpo_fast.run_folder.hub.whoami", HfApi(server.url).whoami)
        return server

    return use


def holds_token(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_run_of_the_command_line_is_pushed_although_requests_fail(hub, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    options = (
        "train --recipe trl --num_epochs 1 --sample_num_steps 2 --sample_batch_size 2 --mixed_precision no "
        "--sample_num_images 2 --prompts demo_animals --output_dir redder --kohya_lora --push_to_hub "
        f"--hub_model_id ann/redder-lions --hub_private --hf_user_access_token {TOKEN}"
    )
    with serving({"/store/": [503], "/commit/main": [500]}) as server:
        hub(server)
        cli.main(options.split())
    files = server.files["ann/redder-lions"]
    assert server.private == {"ann/redder-lions": True}
    assert [method for method, path in server.requests if path.startswith("/store/")].count("PUT") > 1
    assert [path for _, path in server.requests].count("/api/models/ann/redder-lions/commit/main") == 2
    # the bundled model is not on the Hub, so the whole model is pushed
    assert {"README.md", "model_index.json", "rewards.png", "images.png", "unet/config.json"} <= files.keys()
    for name in ("pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"):
        assert files[name] == (tmp_path / "redder" / "final" / name).read_bytes()
    card = files["README.md"].decode()
    assert "license: apache-2.0" in card
    assert "| reward | jpeg_compressibility |" in card
    assert 'load_lora_weights("ann/redder-lions")' in card
    assert "The mean reward was -" in card
    assert "](images.png)" in card
    assert "pushed to http" in capfd.readouterr().out
    assert holds_token(tmp_path) == []
    assert TOKEN not in caplog.text


def test_what_was_pushed_opens_and_a_failed_push_loses_nothing(hub, make_trainer, tmp_path, caplog, capfd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    trainer = make_trainer(use_lora=True, **SMALL)
    trainer.train()
    trainer.save_model()
    with serving() as server:
        hub(server)
        assert trainer.push_to_hub("lions").startswith(f"{server.url}/ann/lions")
    again = tmp_path / "again"
    for name, content in server.files["ann/lions"].items():
        (again / name).parent.mkdir(parents=True, exist_ok=True)
        (again / name).write_bytes(content)
    card = (again / "README.md").read_text()
    assert 'load_lora_weights("ann/lions")' in card
    pushed = StableDiffusionPipeline.from_pretrained(again)
    pushed.load_lora_weights(again)

    with serving({"/commit/main": [403]}) as server:
        hub(server)
        with refused(OSError, "the model was not pushed to ann/lions", "--push_to_hub"):
            trainer.push_to_hub("lions")
    assert (trainer.output_dir / "final" / "README.md").exists()
    assert holds_token(trainer.output_dir) == []
    out, err = capfd.readouterr()
    assert TOKEN not in out + err + caplog.text


def test_of_a_lora_of_a_model_on_the_hub_only_the_adapter_is_pushed(hub, make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    its_card = tmp_path / "README.md"
    its_card.write_text("---\nlicense: openrail\n---\n")
    monkeypatch.setattr("ddpo_fast.run_folder.model_card.hf_hub_download", lambda *_, **__: str(its_card))
    trainer = make_trainer(use_lora=True, num_epochs=0)
    trainer.sd_pipeline.pretrained_model = "somebody/sd"
    with serving() as server:
        hub(server)
        trainer.push_to_hub("lions", private=True)
    files = server.files["ann/lions"]
    assert files.keys() == {"README.md", "pytorch_lora_weights.safetensors"}
    card = files["README.md"].decode()
    assert 'from_pretrained("somebody/sd")\npipeline.load_lora_weights("ann/lions")' in card
    assert "base_model: somebody/sd" in card
    assert "license: openrail" in card
    assert "under the licence of the base model: openrail." in card


def test_a_lora_in_kohyas_layout_draws_the_same(make_trainer):
    trainer = make_trainer(use_lora=True, kohya_lora=True, **SMALL | {"sample_freq": 0})
    # an alpha of another size than the rank
    for layer in trainer.sd_pipeline.unet.modules():
        if "default" in getattr(layer, "scaling", {}):
            layer.scaling["default"] = 2.0
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    trainer.sd_pipeline.unet.peft_config["default"].lora_alpha = 8
    trainer.save_model()
    final = trainer.output_dir / "final"
    kept = load_file(final / "kohya_lora_weights.safetensors")
    assert all(key.startswith("lora_unet_") and key.count(".") in (1, 2) for key in kept)
    assert {float(value) for key, value in kept.items() if key.endswith(".alpha")} == {8.0}
    assert len([key for key in kept if key.endswith(".alpha")]) * 3 == len(kept)
    images = []
    for name in ("pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors", None):
        pipe = StableDiffusionPipeline.from_pretrained(final)
        if name:
            pipe.load_lora_weights(final, weight_name=name)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(
            torch.from_numpy(pipe("a cat", num_inference_steps=2, generator=generator, output_type="np").images)
        )
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)
    assert (images[0] - images[2]).abs().max() > 0.01


def test_kohyas_layout_is_refused_where_there_is_none(make_trainer, tiny_model):
    with refused(ValueError, "kohya_lora is True, and the run trains all weights"):
        make_trainer(kohya_lora=True)
    with refused(ValueError, "kohya_lora is for UNets, and the model has a transformer"):
        make_trainer(model=tiny_model("sd3"), use_lora=True, kohya_lora=True)


def test_what_a_card_says(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: https://x.org\n---\n")
    assert licence_of(str(tmp_path)) == {"license": "other", "license_name": "mine", "license_link": "https://x.org"}
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert licence_of(str(tmp_path)) == {}
    assert curve_sentence([]) == ""
    epochs = [{"kind": "epoch", "images": 8, "reward_mean": mean} for mean in (1.0, 2.5)]
    said = "The mean reward was 1 in the first epoch and 2.5 in epoch 2, after 16 images."
    assert curve_sentence([{"kind": "update"}, *epochs]) == said
