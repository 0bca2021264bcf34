"""The trainer: micro-batches, precision, other predictions, hooks, users' subclasses, and the files of a run."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from compare_runs import changed_share, metrics_of, relative_distance, same_bits, trained_weights
from diffusers import StableDiffusionPipeline
from rounding import RUNS_APART_IN_FP64, drift_limits, in_fp64
from tiny_run import Prompts, brightness, build_pipeline
from transformers import HfArgumentParser

from ddpo_fast import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

# the micro-batch of TRL's order: one timestep of a training batch of 2 images
PLAIN = 2


@torch.no_grad()
def log_prob(trainer, batch: dict, step: int) -> torch.Tensor:
    """The log-probs of one step of a training batch, as TRL's `calculate_loss` finds them."""
    latents, timesteps, next_latents = (batch[name][:, step] for name in ("latents", "timesteps", "next_latents"))
    embeds = torch.cat([batch["negative_prompt_embeds"], batch["prompt_embeds"]])
    output = trainer.sd_pipeline.unet(torch.cat([latents] * 2), torch.cat([timesteps] * 2), embeds).sample
    unconditional, conditional = output.chunk(2)
    output = unconditional + trainer.config.sample_guidance_scale * (conditional - unconditional)
    pipeline, eta = trainer.sd_pipeline, trainer.config.sample_eta
    return pipeline.scheduler_step(output, timesteps, latents, eta=eta, prev_sample=next_latents).log_probs


@pytest.mark.parametrize("fraction", [1.0, 0.6])
def test_packing_does_not_change_the_gradient(make_trainer, monkeypatch, tmp_path, fraction):
    """The accumulated gradient of an update, in fp64, with any micro-batch size against TRL's order."""
    gradients = {}
    for size in (PLAIN, 1, 3, 4, 7, 100):
        trainer = make_trainer(
            train_micro_batch_size=size, train_timestep_fraction=fraction, output_dir=str(tmp_path / f"{size}")
        )
        trainer.sd_pipeline.unet.double()
        generator = torch.Generator().manual_seed(0)

        def randn(*shape, generator=generator):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        width = trainer.neg_prompt_embed.shape[-1]
        batches = [
            {
                "prompt_embeds": randn(2, 32, width),
                "negative_prompt_embeds": randn(2, 32, width),
                "timesteps": torch.tensor([[801, 601, 401, 201, 1], [1, 201, 401, 601, 801]]),
                "latents": randn(2, 5, 4, 8, 8),
                "next_latents": randn(2, 5, 4, 8, 8),
                "log_probs": torch.zeros(2, 5, dtype=torch.float64),
                "advantages": randn(2),
            }
            for _ in range(2)
        ]
        trainer.sd_pipeline.scheduler.set_timesteps(5)
        for batch in batches:  # ratios near 1, on both sides
            for step in range(5):
                batch["log_probs"][:, step] = log_prob(trainer, batch, step) + 1e-3 * randn(2)
        monkeypatch.setattr(trainer.engine, "step", dict)
        trainer._train_batched_samples(0, 0, 0, batches)
        gradients[size] = torch.cat([p.grad.flatten() for p in trainer.engine.parameters])
    expected = gradients.pop(PLAIN)
    assert expected.norm() > 0
    for size, packed in gradients.items():
        assert (packed - expected).norm() < 1e-12 * expected.norm(), size


@pytest.mark.parametrize("use_lora", [False, True])
def test_packed_run_ends_where_the_plain_one_does(make_trainer, tmp_path, use_lora):
    ends = []
    for size in (PLAIN, 16):
        trainer = make_trainer(use_lora=use_lora, train_micro_batch_size=size, output_dir=str(tmp_path / f"{size}"))
        in_fp64(trainer)
        before = trained_weights(trainer)
        trainer.train()
        ends.append(trained_weights(trainer))
    assert relative_distance(ends[1], ends[0], before) < RUNS_APART_IN_FP64


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_full_training_moves_all_weights_at_a_small_rate(make_trainer, precision):
    """The trained weights are fp32 in any compute precision. In TRL 7 % of the elements of bf16 weights move."""
    trainer = make_trainer(mixed_precision=precision, train_learning_rate=1e-5, num_epochs=2)
    before = trained_weights(trainer)
    assert all(w.dtype == torch.float32 for w in before.values())
    trainer.train()
    assert changed_share(before, trained_weights(trainer)) > 0.99


@pytest.mark.parametrize("use_lora", [False, True])
def test_half_precision_keeps_latents_and_trained_weights_in_fp32(make_trainer, use_lora):
    trainer = make_trainer(mixed_precision="bf16", use_lora=use_lora)
    unet = trainer.sd_pipeline.unet
    frozen = {p.dtype for p in unet.parameters() if not p.requires_grad}
    assert frozen == ({torch.bfloat16} if use_lora else set())
    assert trainer.sd_pipeline.vae.dtype == trainer.sd_pipeline.text_encoder.dtype == torch.bfloat16
    seen = []
    unet.conv_out.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    samples, _ = trainer._generate_samples(1, 4)
    assert set(seen) == {torch.bfloat16}
    assert samples[0].trail.dtype == samples[0].log_probs.dtype == torch.float32
    before = trained_weights(trainer)
    trainer.train()
    assert not same_bits(before, trained_weights(trainer))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_ratio_is_one_before_the_first_update(make_trainer, precision):
    """Training scores the latents as they are stored, so only the UNet's rounding in another batch size remains."""
    trainer = make_trainer(mixed_precision=precision)
    limits = drift_limits(trainer)
    trainer.train()
    updates = metrics_of(trainer, "update")
    drifts = [r["ratio_drift"] for r in updates if "ratio_drift" in r]
    assert len(drifts) == 2  # one for each epoch
    assert all(drift <= limit for drift, limit in zip(drifts, limits, strict=True))


def test_recomputed_log_probs_make_the_ratio_one(make_trainer, caplog, tmp_path):
    """Training without guidance scores another policy than the one that sampled: there is a warning, and
    train_recompute_log_probs corrects it."""
    plain = make_trainer(train_cfg=False, train_clip_range=0.01)
    plain.train(1)
    assert "ratio" in caplog.text
    rescored = make_trainer(train_cfg=False, train_recompute_log_probs=True, output_dir=str(tmp_path / "rescored"))
    limits = drift_limits(rescored)
    rescored.train(1)
    drift = [metrics_of(trainer)[0]["ratio_drift"] for trainer in (plain, rescored)]
    assert drift[0] > 1e-3
    assert drift[1] <= limits[0]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_predictions_train(make_trainer, tmp_path, prediction_type):
    build_pipeline(prediction_type).save_pretrained(tmp_path / "model")
    trainer = make_trainer(model=str(tmp_path / "model"), train_learning_rate=1e-5)
    limits = drift_limits(trainer)
    trainer.train()
    updates = metrics_of(trainer, "update")
    assert updates[0]["ratio_drift"] <= limits[0]
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in updates)


@pytest.mark.parametrize("use_lora", [False, True])
def test_what_a_run_leaves(make_trainer, tmp_path, use_lora):
    trainer = make_trainer(use_lora=use_lora, log_with="tensorboard", save_freq=2, num_epochs=3, draws=True)
    trainer.train()
    trainer.save_model()
    run = tmp_path / "run"
    assert json.loads((run / "config.json").read_text())["config"]["num_epochs"] == 3
    assert [r["epoch"] for r in metrics_of(run, "epoch")] == [0, 1, 2]
    assert [r["update"] for r in metrics_of(run, "update")] == list(range(6))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["checkpoint_2", "checkpoint_3"]
    assert (run / "rewards.png").stat().st_size > 1000
    assert list(run.rglob("events.out.tfevents*"))
    assert "library_name: diffusers" in (run / "final" / "README.md").read_text()
    plain = StableDiffusionPipeline.from_pretrained(run / "final")
    if use_lora:
        plain.load_lora_weights(run / "final")
    # The saved model computes in another layout and with other kernels, so both run in fp64; images are fp32.
    mine, theirs = (
        pipe.to(torch.float64)(
            "a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
        for pipe in (trainer.sd_pipeline.sd_pipeline, plain)
    )
    assert abs(mine - theirs).max() < 1e-6
    base = DefaultDDPOStableDiffusionPipeline(trainer.sd_pipeline.pretrained_model, use_lora=False).sd_pipeline
    base_image = base(
        "a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    assert abs(base_image - theirs).max() > 1e-4, "the saved model must be the trained one"


def test_lora_file_has_trls_names(make_trainer, tmp_path):
    from accelerate import PartialState
    from safetensors.torch import load_file
    from trl import DefaultDDPOStableDiffusionPipeline as Theirs

    PartialState(cpu=True)
    trainer = make_trainer(use_lora=True)
    theirs = Theirs(trainer.sd_pipeline.pretrained_model, use_lora=True)
    theirs.save_checkpoint([theirs.get_trainable_layers()], [], str(tmp_path / "theirs"))
    trainer.sd_pipeline.save_checkpoint([trainer.sd_pipeline.unet], [], str(tmp_path / "ours"))
    shapes = [
        {name: value.shape for name, value in load_file(tmp_path / who / "pytorch_lora_weights.safetensors").items()}
        for who in ("theirs", "ours")
    ]
    assert shapes[0] == shapes[1]


def test_lora_shape_is_configurable(model_dir):
    pipeline = DefaultDDPOStableDiffusionPipeline(model_dir, lora_rank=2, lora_alpha=8, lora_target_modules=["to_q"])
    adapted = [n for n, p in pipeline.get_trainable_layers().named_parameters() if p.requires_grad]
    assert adapted
    assert all(".to_q.lora_" in name for name in adapted)


def test_hook_gets_trls_tuples(make_trainer):
    calls = []
    trainer = make_trainer(hook=lambda *args: calls.append(args))
    trainer.train()
    assert [step for _, step, _ in calls] == [0, 2]
    data, _, tracker = calls[0]
    assert len(data) == 2
    images, prompts, metadata, rewards, reward_metadata = data[0]
    assert images.shape == (4, 3, 16, 16)
    assert len(prompts) == len(metadata) == 4
    assert torch.equal(rewards, brightness(images, prompts, metadata)[0])
    assert reward_metadata == {}
    tracker.log_images({"a": images}, step=0)  # works although no tracker is configured


def test_async_rewards_are_the_same(make_trainer, tmp_path):
    ends = []
    for is_async in (False, True):
        trainer = make_trainer(async_reward_computation=is_async, output_dir=str(tmp_path / f"{is_async}"))
        trainer.train()
        ends.append(trained_weights(trainer))
    assert same_bits(*ends)


def test_evaluate_does_not_change_the_run(make_trainer, tmp_path):
    ends = []
    for looks in (False, True):
        trainer = make_trainer(output_dir=str(tmp_path / f"{looks}"))
        if looks:
            first, scores = trainer.evaluate(("a cat", "a dog"), ({}, {}))
            again, _ = trainer.evaluate(("a cat", "a dog"), ({}, {}))
            assert torch.equal(first, again)
            assert scores.shape == (2,)
        trainer.train()
        ends.append(trained_weights(trainer))
    assert same_bits(*ends)


def test_trls_own_unit_tests(make_trainer):
    """What TRL 0.23.1's test file calls."""
    trainer = make_trainer(sample_batch_size=2, train_batch_size=1, train_gradient_accumulation_steps=1)
    samples, output_pairs = trainer._generate_samples(1, 2)
    assert len(samples) == len(output_pairs) == 1
    assert len(output_pairs[0][0]) == 2
    sample = samples[0]
    one = {name: sample[name][0, 0].unsqueeze(0) for name in ("latents", "next_latents", "log_probs", "timesteps")}
    loss, approx_kl, clipfrac = trainer.calculate_loss(
        one["latents"],
        one["timesteps"],
        one["next_latents"],
        one["log_probs"],
        torch.tensor([1.0]),
        torch.cat([sample["negative_prompt_embeds"][:1], sample["prompt_embeds"][:1]]),
    )
    # The call has one row and sampling had many, so the log-prob is rounded differently, by less than the clip range.
    clip_range = trainer.config.train_clip_range
    assert loss.item() == pytest.approx(-1, abs=clip_range)
    assert approx_kl.item() == pytest.approx(0, abs=clip_range**2)
    assert clipfrac.item() == 0
    assert trainer.loss(torch.tensor([-1.0]), 0.0001, torch.tensor([1.0])).item() == pytest.approx(1)
    assert {"prompt_ids", "prompt_embeds", "timesteps", "latents", "log_probs"} <= set(sample.keys())


class CountingPipeline(DefaultDDPOStableDiffusionPipeline):
    """A user's pipeline with its own trainable layers and its own scheduler step."""

    scored = 0

    def get_trainable_layers(self):
        self.unet.requires_grad_(False)
        self.unet.conv_out.requires_grad_(True)
        return list(self.unet.conv_out.parameters())

    def scheduler_step(self, *args, **kwargs):
        self.scored += 1
        return super().scheduler_step(*args, **kwargs)


def test_users_pipeline_subclass(make_trainer, model_dir):
    pipeline = CountingPipeline(model_dir, use_lora=False)
    frozen = pipeline.unet.conv_in.weight.detach().clone()
    head = pipeline.unet.conv_out.weight.detach().clone()
    make_trainer(pipeline=pipeline, train_micro_batch_size=2).train()
    assert pipeline.scored == 2 * 4 * 5  # epochs x training batches x timesteps
    assert torch.equal(pipeline.unet.conv_in.weight, frozen)
    assert not torch.equal(pipeline.unet.conv_out.weight, head)


class ScaledLoss(DDPOTrainer):
    def loss(self, advantages, clip_range, ratio):
        return 0 * super().loss(advantages, clip_range, ratio)


def test_users_trainer_subclass(make_trainer):
    trainer = make_trainer(trainer_class=ScaledLoss, use_lora=True, sample_num_steps=2, num_epochs=1)
    trainer.train()
    assert all(r["loss"] == 0 for r in metrics_of(trainer, "update"))


class OwnUpdates(DDPOTrainer):
    """A user's trainer that replaces the loop over training batches and calls `backward` itself."""

    passes = 0

    def _train_batched_samples(self, inner_epoch, epoch, global_step, batched_samples):
        self.passes += 1
        for batch in batched_samples:
            embeds = torch.cat([batch["negative_prompt_embeds"], batch["prompt_embeds"]])
            names = ("latents", "timesteps", "next_latents", "log_probs")
            loss, _, _ = self.calculate_loss(*(batch[name][:, 0] for name in names), batch["advantages"], embeds)
            loss.backward()
            self.engine.step()
        return global_step + 1


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_users_updates(make_trainer, precision):
    settings = {"mixed_precision": precision, "sample_num_steps": 2, "num_epochs": 1}
    trainer = make_trainer(trainer_class=OwnUpdates, use_lora=True, **settings)
    before = trained_weights(trainer)
    trainer.train()
    assert trainer.passes == 1
    assert not same_bits(before, trained_weights(trainer))


def test_moments_have_the_memory_layout_of_the_weights(make_trainer, tmp_path):
    """A run may be resumed with another memory layout, and fused Adam matches elements by their position in memory."""
    make_trainer(num_epochs=1, fuse_unet=False).train()
    resumed = make_trainer(resume_from=str(tmp_path / "run"), fuse_unet=True)
    for parameter, moments in resumed.optimizer.state.items():
        assert moments["exp_avg"].stride() == parameter.stride()


@dataclass
class ScriptArguments:
    pretrained_model: str = field(default="", metadata={"help": "the pretrained model to use"})
    use_lora: bool = field(default=True, metadata={"help": "Whether to use LoRA."})


def test_trls_example_script(model_dir, tmp_path, monkeypatch):
    """TRL's examples/scripts/ddpo.py with another import: its parser, its hook, and `save_model` at its end."""
    monkeypatch.chdir(tmp_path)
    logged = []

    def image_outputs_logger(image_data, global_step, accelerate_logger):
        images, prompts, _, rewards, _ = image_data[-1]
        result = {f"{p:.25} | {r.item():.2f}": i.unsqueeze(0) for i, p, r in zip(images, prompts, rewards, strict=True)}
        logged.append(result)
        accelerate_logger.log_images(result, step=global_step)

    parser = HfArgumentParser((ScriptArguments, DDPOConfig))
    script_args, training_args = parser.parse_args_into_dataclasses(
        f"--pretrained_model {model_dir} --num_epochs 2 --train_gradient_accumulation_steps 1 --sample_num_steps 3 "
        "--sample_batch_size 2 --train_batch_size 1 --sample_num_batches_per_epoch 2 --mixed_precision no "
        "--per_prompt_stat_tracking=True --per_prompt_stat_tracking_buffer_size=32 --log_with=tensorboard".split()
    )
    training_args.project_kwargs = {
        "logging_dir": "./logs",
        "automatic_checkpoint_naming": True,
        "total_limit": 5,
        "project_dir": "./save",
    }
    pipeline = DefaultDDPOStableDiffusionPipeline(script_args.pretrained_model, use_lora=script_args.use_lora)
    trainer = DDPOTrainer(training_args, brightness, Prompts(), pipeline, image_samples_hook=image_outputs_logger)
    trainer.train()
    trainer.save_model(training_args.output_dir)
    assert len(logged) == 2
    assert sorted(p.name for p in (tmp_path / "save" / "checkpoints").iterdir()) == ["checkpoint_1", "checkpoint_2"]
    assert (tmp_path / "save" / "final" / "pytorch_lora_weights.safetensors").exists()
    assert list((tmp_path / "logs").rglob("events*"))


def test_gradients_of_images_reach_the_unet(model_dir):
    """`rgb_with_grad`, which AlignProp uses, with and without truncated backpropagation."""
    pipeline = DefaultDDPOStableDiffusionPipeline(model_dir, use_lora=False)
    pipeline.set_progress_bar_config(disable=True)
    norms = []
    for first in (0, 2, 3):
        pipeline.unet.zero_grad()
        output = pipeline.rgb_with_grad(
            prompt=["a cat"],
            num_inference_steps=3,
            eta=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            truncated_backprop_rand=False,
            truncated_backprop_timestep=first,
        )
        if first < 3:
            output.images.mean().backward()
            norms.append(pipeline.unet.conv_in.weight.grad.norm().item())
        else:
            assert not output.images.requires_grad
    assert norms[0] != norms[1] > 0


def test_a_compiled_unet_trains_alike(make_trainer, tmp_path, monkeypatch):
    """With the "eager" backend blocks are traced and then run op by op; compiling kernels would take minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ends = []
    for compiled in (False, True):
        trainer = make_trainer(
            compile_unet=compiled,
            sample_merge_batches=1,
            num_epochs=1,
            sample_num_steps=2,
            output_dir=str(tmp_path / f"{compiled}"),
        )
        in_fp64(trainer)
        before = trained_weights(trainer)
        trainer.train()
        ends.append(trained_weights(trainer))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(ends[0]) == list(ends[1]), "names stay"
    assert relative_distance(ends[1], ends[0], before) < RUNS_APART_IN_FP64


def test_what_a_reward_does_to_the_process_does_not_stop_training(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def reward(images, prompts, metadata):
        os.chdir(tmp_path / "elsewhere")
        torch.set_grad_enabled(False)
        return brightness(images, prompts, metadata)

    trainer = make_trainer(reward=reward, output_dir="run", num_epochs=1)
    with torch.enable_grad():
        trainer.train()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (tmp_path / "run" / "checkpoints" / "checkpoint_1").is_dir()


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"])
def test_fsdp_and_megatron_are_refused(make_trainer, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=r"accelerate's config asks for .*, which is not supported: "):
        make_trainer(pipeline=object())


def test_something_that_is_no_pipeline_is_refused(make_trainer):
    with pytest.raises(ValueError, match="sd_pipeline is of class object, without a unet: give a "):
        make_trainer(pipeline=object())
