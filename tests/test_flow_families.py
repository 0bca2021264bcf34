"""Stable Diffusion 3 and FLUX are called, sampled, trained and saved as plain diffusers' pipelines have them."""

from __future__ import annotations

import json
import math
import random
import shutil

import diffusers
import pytest
import torch
from compare_runs import metrics_of, same_bits, trained_weights
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from rounding import drift_limits, in_fp64
from test_step_table import published_step
from torch.distributions import Normal

from ddpo_fast import DDPOConfig, DefaultDDPOStableDiffusionPipeline, recipes
from ddpo_fast.commands import train
from ddpo_fast.families import Prompts, family_of_pipeline, with_family
from ddpo_fast.families.flow import USUAL_LEVELS
from ddpo_fast.families.flux import Flux, packed, unpacked
from ddpo_fast.families.sd3 import StableDiffusion3

STEPS = 3
PROMPTS = ["a cat", "a red dog on a blue background"]


@pytest.fixture(scope="module")
def pipeline_of(tiny_model):
    """`pipeline_of(name)`: a tiny model as training has it, made once."""
    made: dict[str, DefaultDDPOStableDiffusionPipeline] = {}

    def pipeline(name: str) -> DefaultDDPOStableDiffusionPipeline:
        if name not in made:
            made[name] = DefaultDDPOStableDiffusionPipeline(tiny_model(name), use_lora=False)
            made[name].set_progress_bar_config(disable=True)
        return made[name]

    return pipeline


def inputs_of(transformer, run) -> list[dict[str, torch.Tensor]]:
    """The tensors of each call of the transformer in a run."""
    calls = []

    def see(module, arguments, keywords):
        calls.append({name: value for name, value in keywords.items() if isinstance(value, torch.Tensor)})

    handle = transformer.register_forward_pre_hook(see, with_kwargs=True)
    run()
    handle.remove()
    return calls


CASES = [
    ("sd35", 1.0, None),
    ("sd35", 4.0, None),
    ("sd35", 4.0, "a blurry drawing"),
    ("sd3_without_t5", 4.0, "a blurry drawing"),
    ("sd3_small_patches", 4.0, "a blurry drawing"),
    ("flux_dev", 1.0, None),
    ("flux_dev", 3.5, None),
    ("flux_schnell", 1.0, None),
]


@pytest.mark.parametrize(("name", "guidance_scale", "negative"), CASES)
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_inputs_and_images_are_those_of_plain_diffusers(pipeline_of, name, guidance_scale, negative, size):
    """Each call's inputs to the bit, from the same latents; the images of the ODE up to rounding of the steps."""
    pipeline = pipeline_of(name)
    plain, family = pipeline.sd_pipeline, pipeline.family
    transformer = plain.transformer
    height, width = size
    settings = {
        "height": height,
        "width": width,
        "num_inference_steps": STEPS,
        "guidance_scale": guidance_scale,
        "output_type": "pt",
    }
    guided = {} if isinstance(family, Flux) else {"negative_prompt": negative and [negative] * 2}
    images = []

    def draw(drawn_by, **more):
        generator = torch.Generator().manual_seed(3)
        images.append(drawn_by(prompt=PROMPTS, generator=generator, **settings, **guided, **more).images)

    theirs = inputs_of(transformer, lambda: draw(plain))
    draw(pipeline, eta=0.0)
    # three steps of latents near 1 in fp32
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)
    assert images[0].shape == (2, 3, *size)

    sized = family.at(height, width, guidance_scale)
    sized.set_steps(STEPS, "cpu")
    guides = guidance_scale > 1 and family.guides_by_rows
    given = Prompts(PROMPTS, guided.get("negative_prompt"), guides=guides)
    embeds, negatives = sized.prepare_prompts(given, torch.device("cpu"))
    embeds = torch.cat([negatives, embeds]) if guides else embeds
    assert len(theirs) == STEPS
    for key, other in zip(sized.keys, theirs, strict=True):
        rows = other["hidden_states"]
        if isinstance(family, Flux):
            rows = unpacked(rows, *sized.latent_shape[1:])
            assert torch.equal(packed(rows), other["hidden_states"])
        with torch.no_grad():
            ours = inputs_of(transformer, lambda: sized.call(rows, key, embeds))[0]  # noqa: B023
        assert ours.keys() == other.keys()
        assert ("guidance" in ours) == (name == "flux_dev")
        for what, value in other.items():
            assert torch.equal(ours[what], value), what


@pytest.mark.parametrize("name", ["sd35", "flux_dev"])
def test_a_call_for_other_images_leaves_a_runs_steps(pipeline_of, name):
    """FLUX's noise levels follow the number of tokens, and a run's are set again after images of another size."""
    family = pipeline_of(name).family.at(16, 16, 1.0)
    family.set_steps(STEPS, "cpu")
    table = family.table(1.0, torch.device("cpu"))
    other = family.at(16, 24, 1.0)
    other.set_steps(STEPS, "cpu")
    assert torch.equal(other.table(1.0, torch.device("cpu")), table) == (name == "sd35")
    assert family.num_steps is None
    family.set_steps(STEPS, "cpu")
    assert family.num_steps == STEPS
    assert family.table(1.0, torch.device("cpu")) is table


@pytest.mark.parametrize("sampler", USUAL_LEVELS)
def test_steps_outside_a_window_are_the_odes(pipeline_of, sampler):
    family = pipeline_of("sd35").family.at(16, 16, 1.0)
    family.use(16, 16, 1.0, sampler, None)
    family.set_steps(10, "cpu")
    cpu = torch.device("cpu")
    every, still = family.table(1.0, cpu), family.table(0.0, cpu)
    assert [family.has_noise(i) for i in range(10)] == [True] * 9 + [False]
    assert torch.equal(every, family.table(USUAL_LEVELS[sampler], cpu))
    family.use(16, 16, 1.0, sampler, [2, 4])
    windowed = family.table(1.0, cpu)
    assert torch.equal(windowed[2:5], every[2:5])
    outside = [0, 1, 5, 6, 7, 8, 9]
    assert torch.equal(windowed[outside], still[outside])
    assert (windowed[outside, 2] == 0).all()
    assert [family.has_noise(i) for i in range(10)] == [2 <= i <= 4 for i in range(10)]


RUN = {
    "num_epochs": 1,
    "sample_num_steps": 4,
    "sample_batch_size": 2,
    "sample_num_batches_per_epoch": 1,
    "train_batch_size": 2,
    "train_gradient_accumulation_steps": 1,
    "train_micro_batch_size": 5,
    "height": 16,
    "width": 24,
}


def expected_gradient(trainer, sample, rewards) -> list[torch.Tensor]:
    """The gradient of DDPO's loss at ratios of 1 by autograd through the network in fp64, from the published steps."""
    config, family = trainer.policy.config, trainer.policy.family
    parameters = [p for p in trainer.sd_pipeline.unet.parameters() if p.requires_grad]
    advantages = (rewards - rewards.mean()) / (rewards.std(unbiased=False) + 1e-8)
    embeds = sample.prompt_embeds
    if family.guides_by_rows:
        embeds = torch.cat([sample.negative_prompt_embeds, embeds])
    s = [*(family.pipe.scheduler.timesteps.double() / 1000).tolist(), 0.0]
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(config.sample_num_steps - 1):
        latents, key = sample.latents[:, i], torch.tensor(i)
        rows = torch.cat([latents] * (len(embeds) // len(latents)))
        output = family.call(rows, key, embeds.double())
        if family.guides_by_rows:
            uncond, text = output.chunk(2)
            output = uncond + config.sample_guidance_scale * (text - uncond)
        mean, deviation = published_step(family.sampler, latents, output, s[i], s[i + 1], s[1], 0.7)
        log_prob = Normal(mean, deviation).log_prob(sample.next_latents[:, i]).flatten(1).mean(1)
        loss = loss - (advantages * (log_prob - log_prob.detach()).exp()).mean() / (config.sample_num_steps - 1)
    return torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize(("name", "use_lora"), [("sd35", False), ("sd3_without_t5", True), ("flux_dev", True)])
def test_a_run_has_the_gradient_of_autograd_and_its_model_opens(make_trainer, tiny_model, name, use_lora):
    rewards = torch.tensor([1.0, -2.0], dtype=torch.float64)
    settings = {**RUN, "reward": lambda *_: (rewards, {})}
    trainer = in_fp64(make_trainer(model=tiny_model(name), use_lora=use_lora, **settings))
    family = trainer.policy.family
    seen, generate, step = {}, trainer._generate_samples, trainer.engine.step

    def generate_and_differentiate(*args, **kwargs):
        samples, batches = generate(*args, **kwargs)
        with torch.enable_grad(), trainer.engine.computing():
            seen["expected"] = expected_gradient(trainer, samples[0], rewards)
        assert (samples[0].negative_prompt_embeds.numel() > 0) == family.guides_by_rows
        return samples, batches

    def see_step(*args):
        seen["gradient"] = [parameter.grad.clone() for parameter in trainer.engine.parameters]
        return step(*args)

    trainer._generate_samples, trainer.engine.step = generate_and_differentiate, see_step
    trainer.train()
    (update,) = metrics_of(trainer, "update")
    assert update["ratio_drift"] < 1e-6
    assert trainer.config.sample_guidance_scale == DDPOConfig().sample_guidance_scale
    norm = torch.cat([part.flatten() for part in seen["expected"]]).norm()
    assert norm > 0
    for gradient, expected in zip(seen["gradient"], seen["expected"], strict=True):
        # the table of steps and the scheduler's timesteps are in fp32
        assert (gradient - expected).norm() < 1e-5 * norm

    trainer.sd_pipeline.unet.float()
    trainer.save_model()
    final = trainer.output_dir / "final"
    absent = {} if "text_encoder_3" not in family.optional else {"text_encoder_3": None, "tokenizer_3": None}
    opened = getattr(diffusers, family.pipelines[0]).from_pretrained(final, **(absent if name != "sd35" else {}))
    if use_lora:
        opened.load_lora_weights(final)
    example = f"{family.pipelines[0]}.from_pretrained({json.dumps(str(final))}"
    example += ", text_encoder_3=None, tokenizer_3=None)" if name == "sd3_without_t5" else ")"
    assert example in (final / "README.md").read_text()
    other = type(family)(opened)
    other.use(16, 24, 3.5)
    other.set_steps(4, "cpu")
    inputs = torch.randn(1, 16, 8, 12), torch.tensor(1), trainer.policy.embed_prompts(["a cat"])[1].float()
    family.use(16, 24, 3.5)
    with torch.no_grad():
        # rounding of sums of a few hundred terms near 1
        torch.testing.assert_close(other.call(*inputs), family.call(*inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "precision", "micro_batch"), [("sd35", "no", 1), ("flux_dev", "bf16", 4)])
def test_first_ratios_are_one(make_trainer, tiny_model, name, precision, micro_batch):
    settings = {**RUN, "mixed_precision": precision, "train_micro_batch_size": micro_batch, "sde_window": [0, 1]}
    trainer = make_trainer(model=tiny_model(name), use_lora=True, **settings)
    limits = drift_limits(trainer)
    trainer.train()
    (update,) = metrics_of(trainer, "update")
    assert update["ratio_drift"] < limits[0]
    assert math.isfinite(limits[0])
    assert update["zero_gradient"] == 0


def drawn_prompt() -> tuple[str, dict]:
    # a checkpoint has the state of this generator
    return random.choice(PROMPTS), {}


@pytest.mark.parametrize(("name", "use_lora"), [("flux_schnell", False), ("sd3_small_patches", True)])
def test_a_resumed_run_ends_with_the_same_bits(make_trainer, tiny_model, tmp_path, name, use_lora):
    settings = {**RUN, "model": tiny_model(name), "use_lora": use_lora, "num_epochs": 2, "sampler": "dance"}
    # the second epoch's values of steps are learned from the first one's images too
    settings |= {"prompts": drawn_prompt, "train_image_credit": "value"}
    whole = make_trainer(output_dir=tmp_path / "whole", **settings)
    before = trained_weights(whole)
    whole.train()
    assert not same_bits(before, trained_weights(whole))
    make_trainer(output_dir=tmp_path / "cut", **settings).train(1)
    resumed = make_trainer(output_dir=tmp_path / "cut", resume_from=str(tmp_path / "cut"), **settings)
    resumed.train()
    assert same_bits(trained_weights(whole), trained_weights(resumed))


def test_an_adapter_beside_the_model_is_trained_further(tiny_model, tmp_path):
    """Also one on other layers and of another rank than the family's usual ones, and than its recipe's."""
    folder = shutil.copytree(tiny_model("sd35"), tmp_path / "model")
    plain = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    plain.transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False))
    state = get_peft_model_state_dict(plain.transformer)
    metadata = {"r": 3, "lora_alpha": 6, "target_modules": ["to_q"]}
    plain.save_lora_weights(folder, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata)
    pipeline = DefaultDDPOStableDiffusionPipeline(str(folder))
    assert (pipeline.lora_config.r, pipeline.lora_config.target_modules) == (3, {"to_q"})
    pipeline.get_trainable_layers()
    trained = {name: p for name, p in pipeline.unet.named_parameters() if p.requires_grad}
    assert {name.replace(".default", "") for name in trained} == set(state)
    assert all(torch.equal(p, state[name.replace(".default", "")]) for name, p in trained.items())
    run, _ = train.read_options(["--pretrained_model", str(folder), "--height", "16", "--width", "16"])
    assert (run.recipe, run.lora_rank) == ("sd3-lora", 4)


def parts_configs(pipeline) -> dict[str, dict]:
    parts = pipeline.sd_pipeline.components
    return {name: dict(parts[name].config) for name in ("transformer", "vae")} | {
        name: parts[name].config.to_dict() for name in pipeline.family.text_encoders
    }


@pytest.mark.parametrize(
    ("name", "part", "setting", "value", "words"),
    [
        ("sd35", "transformer", "in_channels", 32, "takes 32 channels"),
        ("sd35", "transformer", "pooled_projection_dim", 8, "pooled embedding of 8 elements"),
        ("sd35", "text_encoder_3", "d_model", 8, "text of width 48, and its T5 gives 8"),
        ("flux_dev", "transformer", "in_channels", 384, "takes 384 numbers a patch and gives 384"),
        ("flux_dev", "transformer", "pooled_projection_dim", 8, "a pooled embedding of width 8"),
        ("flux_dev", "text_encoder_2", "d_model", 8, "text of width 48"),
    ],
)
def test_models_of_another_kind_are_refused(pipeline_of, name, part, setting, value, words):
    pipeline = pipeline_of(name)
    configs = parts_configs(pipeline)
    pipeline.family.check(configs)
    configs[part][setting] = value
    with pytest.raises(ValueError, match=words):
        pipeline.family.check(configs)


def test_settings_that_flow_matching_cannot_have_are_refused(pipeline_of):
    family = pipeline_of("sd35").family
    with pytest.raises(ValueError, match="height is 64, but the model has positions for at most 48"):
        family.use(64, 16)
    with pytest.raises(ValueError, match="sampler is 'ddim'"):
        family.use(16, 16, sampler="ddim")
    with pytest.raises(ValueError, match="no step with noise"):
        with_family(DDPOConfig(sample_num_steps=1), StableDiffusion3)
    for settings in ({"objective": "rwr"}, {"train_image_credit": "coca"}):
        with pytest.raises(ValueError, match="flow matching"):
            with_family(DDPOConfig(**settings), StableDiffusion3)
    with pytest.raises(ValueError, match="negative_prompts is set"):
        with_family(DDPOConfig(negative_prompts="ugly"), Flux)
    assert with_family(DDPOConfig(), Flux).rows_per_image == 1


def test_precisions_of_frozen_parts(pipeline_of):
    """T5 leaves the range of fp16."""
    family = family_of_pipeline(pipeline_of("flux_dev").sd_pipeline)
    half = {name: family.dtype_of(name, part.config, torch.float16) for name, part in family.frozen_parts.items()}
    assert half["text_encoder"] == torch.float16
    assert half["text_encoder_2"] == torch.bfloat16
    assert family.dtype_of("text_encoder_2", family.pipe.text_encoder_2.config, torch.float32) == torch.float32


@pytest.mark.parametrize("family", [StableDiffusion3, Flux])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_the_recipes_hold_for_their_family(family, weights):
    config = with_family(recipes.config(f"{family.recipe}-{weights}"), family)
    assert config.num_train_timesteps == config.sample_num_steps - 1
    assert config.sampler in family.samplers


@pytest.mark.parametrize(("model", "recipe"), [("sd3_without_t5", "sd3-lora"), ("flux_dev", "flux-lora")])
def test_the_command_line_takes_the_families_recipe(tiny_model, model, recipe):
    run, config = train.read_options(["--pretrained_model", tiny_model(model), "--sample_num_steps", "4"])
    assert run.recipe == recipe
    assert config.sampler == "flow_sde"
    assert config.sample_num_steps == 4
