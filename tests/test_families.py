"""What is told of a kind of model from its configs, and the settings that its inputs and its steps depend on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from compare_runs import metrics_of
from one_sentence import refused
from tiny_run import Prompts

from ddpo_fast import DDPOConfig
from ddpo_fast.families import SDXL, StableDiffusion, family_of, with_family
from ddpo_fast.families.base import with_pooled, without_pooled
from ddpo_fast.model_configs import check_model


@pytest.mark.parametrize(("model", "family"), [("sd2_v_zero_snr", StableDiffusion), ("sdxl", SDXL)])
def test_the_family_is_told_from_the_configs(tiny_model, model, family):
    configs = check_model(tiny_model(model), steps=3)
    assert configs.family is family
    assert configs.image_size == (16, 16)
    assert family.latent_shape_of(configs.parts, 24, None) == (4, 12, 8)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("sd2_epsilon_zero_snr", "zero terminal SNR"),
        ("inpainting", "9 channels and gives 4, as one for inpainting"),
        ("sdxl_refiner", "has no text_encoder and tokenizer"),
        ("sdxl_inpainting", "9 channels"),
    ],
)
def test_other_models_are_refused_with_those_that_work(tiny_model, model, words):
    with refused(ValueError, words) as caught:
        check_model(tiny_model(model))
    if model != "sd2_epsilon_zero_snr":
        assert "Stable Diffusion 1.x or 2.x" in str(caught.value)
        assert "Stable Diffusion XL" in str(caught.value)


def test_a_folder_that_has_lost_t5_says_how_to_train_without(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("sd35"), tmp_path / "model")
    shutil.rmtree(folder / "text_encoder_3")
    with refused(ValueError, r"no text_encoder_3/config.json: .* or leave it out by \[null, null\] for text_encoder_3"):
        check_model(str(folder))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder_3": [None, None]}))
    assert "text_encoder_3" not in check_model(str(folder)).parts


def test_a_class_of_another_name_is_judged_by_its_parts():
    assert family_of({"_class_name": "SomebodysPipeline"}) is StableDiffusion


@pytest.mark.parametrize("width", [3, 4, 9])
def test_a_pooled_embedding_is_kept_in_rows_of_the_prompt(width):
    tokens, pooled = torch.randn(2, 5, 4), torch.randn(2, width)
    packed = with_pooled(tokens, pooled)
    assert packed.shape == (2, 5 + -(-width // 4), 4)
    for kept, given in zip(without_pooled(packed, width), (tokens, pooled), strict=True):
        assert torch.equal(kept, given)


def test_what_depends_on_the_family_is_in_a_copy_of_the_settings():
    class Flow(StableDiffusion):
        guides_by_rows = last_step_has_noise = False
        samplers = ("flow_sde",)

    config = DDPOConfig(sample_num_steps=4)
    assert with_family(config, StableDiffusion) is config
    found = with_family(config, Flow)
    assert (found.rows_per_image, found.rows_per_pair, found.num_train_timesteps) == (1, 1, 3)
    assert (config.rows_per_image, config.rows_per_pair, config.num_train_timesteps) == (2, 2, 4)
    for settings in ({"train_image_credit": "coca"}, {"objective": "rwr"}):
        with refused(ValueError, "is not sampled by DDIM"):
            Flow.check_settings({}, DDPOConfig(**settings))
    for settings, remedy in (
        ({"sample_num_steps": 1}, "num_steps"),
        ({"sde_window": [49, 49]}, "window that begins sooner"),
    ):
        with refused(ValueError, f"no step with noise to train on: use a larger .*{remedy}"):
            with_family(DDPOConfig(**settings), Flow)


def test_steps_outside_the_window_are_deterministic_and_not_trained(make_trainer):
    trainer = make_trainer(
        sde_window=[1, 2], sample_num_steps=5, num_epochs=1, prompts=Prompts(), train_micro_batch_size=4
    )
    samples, generate = [], trainer._generate_samples

    def keep(*args, **kwargs):
        made, batches = generate(*args, **kwargs)
        samples.extend(made)
        return made, batches

    trainer._generate_samples = keep
    trained = []
    trainer.sd_pipeline.unet.register_forward_pre_hook(
        lambda unet, inputs: trained.append(inputs[1]) if unet.training else None
    )
    trainer.train()
    family, sample = trainer.policy.family, samples[0]
    rows = trainer.policy.noise_table[family.keys]
    noisy, still = (family.steps_table(eta, torch.device("cpu"), "none")[family.keys] for eta in (1.0, 0.0))
    assert torch.equal(rows, torch.cat([still[:1], noisy[1:3], still[3:]]))
    assert (rows[:, 2] > 0).tolist() == [False, True, True, False, False]
    assert (sample.log_probs != 0).all(0).tolist() == [False, True, True, False, False]
    assert sorted(set(torch.cat(trained).tolist())) == sorted(family.keys[1:3].tolist())
    assert sum(map(len, trained)) == 2 * 8, "the two steps of eight images"
    assert trainer.num_train_timesteps == 2
    assert metrics_of(trainer, "update")[0]["ratio_drift"] < 1e-4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampler": "cps"}, "sampler is 'cps', and the model is a Stable Diffusion, which samples with 'ddim'"),
        ({"height": 20}, "height is 20, which 8 does not divide"),
        ({"sde_window": [2, 5]}, r"sde_window is \[2, 5\], and the steps of sample_num_steps=5 are 0 to 4"),
        ({"sde_window": [4, 4], "train_skip_last_steps": 0.2}, "no step with noise .* use less train_skip"),
    ],
)
def test_settings_that_the_model_cannot_have_are_refused(make_trainer, tmp_path, settings, words):
    with refused(ValueError, words):
        make_trainer(**settings)
    assert not (tmp_path / "run").exists()


def test_images_of_a_chosen_size(make_trainer):
    shapes = []

    def reward(images, prompts, metadata):
        shapes.append(tuple(images.shape[1:]))
        return images.float().mean((1, 2, 3)), {}

    trainer = make_trainer(height=8, width=24, reward=reward, num_epochs=1, sample_num_steps=2, prompts=Prompts())
    trainer.train()
    trainer.evaluate(("a cat",), ({},))
    assert set(shapes) == {(3, 8, 24)}
    assert trainer.policy.latent_shape == (4, 4, 12)
