"""Each row of docs/differences_from_trl.md: what is broken in TRL 0.23.1 works as its documentation says.

The numbers are the table's. Rows that are tested elsewhere: 3, 10, 16, 19, 25 (test_trainer.py), 7, 8
(test_two_processes.py), 18 (test_advantages.py), 26 (test_waits.py), 29 (test_health.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compare_runs import metrics_of, trained_weights
from rounding import drift_limits
from safetensors.torch import load_file
from tiny_run import SETTINGS, Prompts, brightness

from ddpo_fast import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline


def test_1_2_starts_and_saves_with_the_defaults(model_dir, tmp_path, monkeypatch):
    """TRL logs before accelerate has a state, which raises, and its first checkpoint has no folder."""
    monkeypatch.chdir(tmp_path)
    config = DDPOConfig(mixed_precision="no", num_epochs=2, sample_num_steps=2, run_name="mine", num_checkpoint_limit=1)
    DDPOTrainer(config, brightness, Prompts(), DefaultDDPOStableDiffusionPipeline(model_dir)).train()
    # row 22: run_name, logdir and num_checkpoint_limit have an effect
    assert [p.name for p in (tmp_path / "logs" / "mine" / "checkpoints").iterdir()] == ["checkpoint_2"]


def test_4_hook_without_a_tracker(make_trainer):
    trackers = []
    make_trainer(hook=lambda data, step, tracker: trackers.append(tracker), num_epochs=1).train()
    trackers[0].log({"a": 1}, step=0)
    trackers[0].log_images({}, step=0)


def test_5_model_can_be_saved_and_pushed(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(use_lora=True)
    trainer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model_index.json").exists()
    assert (tmp_path / "saved" / "pytorch_lora_weights.safetensors").exists()
    pushed = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path, repo_id, **kwargs):
            pushed[repo_id] = sorted(p.name for p in Path(folder_path).iterdir())
            pushed["card"] = (Path(folder_path) / "README.md").read_text()
            return "url"

    monkeypatch.setattr("ddpo_fast.run_folder.hub.HfApi", Api)
    assert trainer.push_to_hub() == "url"
    assert "model_index.json" in pushed["run"]
    assert "README.md" in pushed["run"]
    trainer.push_to_hub("somebody/animals")
    assert 'from_pretrained("somebody/animals")' in pushed["card"]
    assert 'load_lora_weights("somebody/animals")' in pushed["card"]
    trainer.create_model_card("mine", tags="animals")
    assert "animals" in (trainer.output_dir / "README.md").read_text()


def test_6_negative_prompts_as_a_list(make_trainer, tmp_path):
    trainer = make_trainer(negative_prompts=["blurry", "ugly"])
    same = make_trainer(negative_prompts="blurry, ugly", output_dir=str(tmp_path / "same"))
    assert torch.equal(trainer.neg_prompt_embed, same.neg_prompt_embed)
    trainer.train(1)


def run_and_resume(make_trainer, tmp_path, first_epochs, resume_from, **settings):
    first = make_trainer(num_epochs=first_epochs, **settings)
    first.train()
    return first, make_trainer(resume_from=str(tmp_path / resume_from), **settings)


def test_12_resumed_lora_goes_on_training(make_trainer, tmp_path):
    """TRL loads a second adapter, and its optimizer still trains the first."""
    first, second = run_and_resume(make_trainer, tmp_path, 1, "run", use_lora=True)
    assert list(second.sd_pipeline.unet.peft_config) == ["default"]
    trained = {n: p for n, p in second.sd_pipeline.unet.named_parameters() if p.requires_grad}
    for name, parameter in first.sd_pipeline.unet.named_parameters():
        if name in trained:
            assert torch.equal(trained[name], parameter), name
    assert {id(p) for p in second.engine.parameters} == {id(p) for p in trained.values()}
    before = trained_weights(second)
    second.train()
    assert not any(torch.equal(before[name], parameter) for name, parameter in trained.items())


def test_12_training_continues_from_a_saved_lora(make_trainer, tmp_path, model_dir):
    """TRL trains a new adapter and leaves the loaded one inactive."""
    trainer = make_trainer(use_lora=True, num_epochs=1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    again = DefaultDDPOStableDiffusionPipeline(str(tmp_path / "saved"))
    loaded = {n: p for n, p in again.get_trainable_layers().named_parameters() if p.requires_grad}
    trained = {n: p for n, p in trainer.sd_pipeline.unet.named_parameters() if p.requires_grad}
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[n], trained[n]) for n in trained)


def test_13_resumes_at_the_right_epoch(make_trainer, tmp_path):
    """TRL takes the number of checkpoints that were saved for the number of epochs."""
    _, second = run_and_resume(make_trainer, tmp_path, 7, "run", save_freq=2, sample_num_steps=2)
    assert second.first_epoch == 7  # there are checkpoints after epochs 2, 4, 6 and 7


def test_14_resumes_from_a_named_checkpoint(make_trainer, tmp_path):
    _, second = run_and_resume(make_trainer, tmp_path, 3, "run/checkpoints/checkpoint_2", sample_num_steps=2)
    assert second.first_epoch == 2
    second.train(4)
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    # the later checkpoint of the first run is renamed, so that nothing resumes from it
    assert names == ["checkpoint_1", "checkpoint_2", "checkpoint_3", "checkpoint_3.superseded", "checkpoint_4"]


def test_15_counters_and_statistics_continue(make_trainer, tmp_path):
    settings = {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 2}
    first, second = run_and_resume(make_trainer, tmp_path, 2, "run", **settings)
    assert first.stat_tracker.get_stats() == second.stat_tracker.get_stats() != {}
    second.train(3)
    assert [record["update"] for record in metrics_of(second, "update")] == list(range(6))


def test_17_no_noise_means_no_log_probs(model_dir):
    """TRL returns NaN."""
    with pytest.raises(ValueError, match="sample_eta is 0"):
        DDPOConfig(sample_eta=0)
    pipeline = DefaultDDPOStableDiffusionPipeline(model_dir)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(prompt=["a cat"], num_inference_steps=3, eta=0.0, output_type="pt")
    assert output.log_probs == []
    assert output.images.isfinite().all()
    step = pipeline.scheduler_step(torch.zeros(1, 4, 8, 8), torch.tensor([1]), torch.zeros(1, 4, 8, 8))
    assert step.log_probs is None


def test_18_whole_number_rewards(make_trainer):
    def ranks(images, prompts, metadata):
        return torch.arange(len(images)), {}

    trainer = make_trainer(reward=ranks, num_epochs=1, sample_num_batches_per_epoch=1)
    train, advantages = trainer._train_batched_samples, []

    def keep_advantages(inner_epoch, epoch, global_step, batches):
        batches = list(batches)
        advantages.extend(batch["advantages"] for batch in batches)
        return train(inner_epoch, epoch, global_step, batches)

    trainer._train_batched_samples = keep_advantages
    trainer.train()
    # training shuffles the images
    np.testing.assert_allclose(torch.cat(advantages).sort().values, [-1.3416, -0.4472, 0.4472, 1.3416], rtol=1e-3)


def test_20_long_prompts_have_their_own_statistics(make_trainer):
    """TRL's key is the prompt cut to the tokenizer's length."""
    prompts = iter(["a lion " * 40 + ending for ending in ("cat", "dog") * 4])
    trainer = make_trainer(prompts=lambda: (next(prompts), {}), per_prompt_stat_tracking=True, num_epochs=1)
    trainer.train()
    assert len(trainer.stat_tracker.get_stats()) == 2


def test_21_tensorboard_has_the_rewards(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(log_with="tensorboard", num_epochs=2)
    trainer.train()
    trainer.accelerator.end_training()
    folder = next(p.parent for p in tmp_path.rglob("events*") if p.parent.name == "trl")
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"reward_mean", "reward_std", "loss", "approx_kl"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("reward_mean")] == [0, 2]


def test_24_metrics_hold_no_graph(make_trainer, monkeypatch):
    trainer = make_trainer(num_epochs=1)
    seen = []
    write = trainer.run_log.log_updates

    def keep(updates, *rest):
        seen.extend(updates)
        return write(updates, *rest)

    monkeypatch.setattr(trainer.run_log, "log_updates", keep)
    trainer.train()
    assert all(not value.requires_grad for update in seen for value in update.values())


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_guidance_of_one_or_less_means_none(make_trainer, scale):
    """TRL stops with a shape error. Without guidance the UNet gets no unconditional rows."""
    trainer = make_trainer(sample_guidance_scale=scale, sample_merge_batches=1, train_micro_batch_size=2)
    rows = []
    trainer.sd_pipeline.unet.register_forward_pre_hook(lambda _m, inputs: rows.append(len(inputs[0])))
    limits = drift_limits(trainer)
    trainer.train(1)
    assert set(rows) == {4, 2}  # the sizes of a sampling and of a training call, not doubled
    assert metrics_of(trainer)[0]["ratio_drift"] <= limits[0]


def test_27_latents_are_stored_once(make_trainer):
    sample = make_trainer()._generate_samples(1, 4)[0][0]
    assert sample.latents.data_ptr() == sample.trail.data_ptr()
    assert torch.equal(sample["latents"][:, 1:], sample["next_latents"][:, :-1])
    assert sample.trail.shape[1] == SETTINGS["sample_num_steps"] + 1


def test_lora_export_does_not_carry_the_adapters_names(make_trainer, tmp_path):
    """TRL saves the UNet under PEFT's parameter names, which diffusers does not know: it loads random weights."""
    trainer = make_trainer(use_lora=True)
    trainer.save_model(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "unet" / "diffusion_pytorch_model.safetensors")
    assert not [n for n in names if "lora" in n or "base_layer" in n]
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_a_run_can_branch_off_into_another_folder(make_trainer, tmp_path):
    make_trainer(num_epochs=2).train()
    branch = make_trainer(
        resume_from=str(tmp_path / "run/checkpoints/checkpoint_1"), output_dir=str(tmp_path / "branch")
    )
    assert branch.first_epoch == 1
    branch.train(2)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint_2").exists()
    assert [record["epoch"] for record in metrics_of(branch, "epoch")] == [1]
