"""What each of several processes runs: `process_worker.py MODEL FOLDER CASES.json`, under torchrun or alone.

A case is settings of a run, whose random states, samples and weights it leaves in FOLDER/NAME. It may draw what the
processes of the run `like` drew, one after the other, or go on from the run that it `resumes`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tiny_run import SETTINGS, brightness, forget_accelerate_state

from ddpo_fast import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from ddpo_fast.prompts import load_prompts
from ddpo_fast.run_folder import checkpoint

LINEAR = torch.nn.functional.linear
BATCHES = SETTINGS["sample_num_batches_per_epoch"]


def main() -> None:
    torch.set_num_threads(1)
    model, folder, cases = sys.argv[1], Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    for name, settings in cases.items():
        forget_accelerate_state()
        run(model, folder, name, settings)


def run(model: str, folder: Path, name: str, settings: dict) -> None:
    like, use_lora = settings.pop("like", None), settings.pop("use_lora", False)
    epochs, resumed = settings.pop("epochs", None), settings.pop("resumes", None)
    if resumed:
        settings["resume_from"] = str(folder / resumed)
    config = DDPOConfig(**SETTINGS | {"output_dir": str(folder / name), "per_prompt_stat_tracking": True} | settings)
    pipeline = DefaultDDPOStableDiffusionPipeline(model, use_lora=use_lora)
    trainer = DDPOTrainer(config, brightness, load_prompts("animals"), pipeline)
    process = trainer.accelerator.process_index
    if like is None:
        torch.save(checkpoint.random_state(), folder / name / f"states_{process}.pt")
    else:
        draw_like(trainer, folder / like)
    kept = {}
    with_advantages(trainer, kept)
    trainer.train(epochs)
    kept["linear_is_torchs"] = torch.nn.functional.linear is LINEAR
    kept["advantages"] = trainer.accelerator.gather(kept["advantages"].to(trainer.accelerator.device))
    kept["trail"] = trainer.accelerator.gather(kept["trail"])
    kept["prompts"] = len(trainer.stat_tracker.get_stats())
    with trainer.engine.exact():
        if trainer.accelerator.is_main_process:
            kept["weights"] = {n: p.detach().clone() for n, p in pipeline.unet.named_parameters() if p.requires_grad}
            torch.save(kept, folder / name / "result.pt")
    trainer.save_model()


def with_advantages(trainer: DDPOTrainer, kept: dict) -> None:
    """Keeps the first epoch's latents and advantages."""
    train_on = trainer._train_on

    def keep(trajectory, *rest):
        kept.setdefault("trail", trajectory.trail)
        kept.setdefault("advantages", trajectory.advantages)
        return train_on(trajectory, *rest)

    trainer._train_on = keep


def draw_like(trainer: DDPOTrainer, other: Path) -> None:
    """Draws the first epoch's batches from the random states of another run's processes, in turn."""
    draw, drawn = trainer.rollout.draw, []

    def draw_as_another(*arguments):
        process, batch = divmod(len(drawn), BATCHES)
        if batch == 0:
            states = torch.load(other / f"states_{process}.pt", weights_only=True)
            checkpoint.restore_random_state(states)
        drawn.append(batch)
        return draw(*arguments)

    trainer.rollout.draw = draw_as_another


if __name__ == "__main__":
    main()
