"""One run of `learning.py` in a process of its own: trains, and writes the record when the run ends.

    python -m lib.learning_run SPEC RECORD.json        SPEC is JSON, see `planned` in learning_schedule.py

Seconds are those of the trainer's epochs: without the start, evaluations, and the rewards that are only logged.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d

from ddpo_fast import rewards
from ddpo_fast.tiny_sd import MODEL
from lib import records
from lib.colour_reward import colour
from lib.learning_contenders import config_settings, lora_settings, trl_settings
from lib.run_trainer import make_ours, make_trl, peak_bytes, timed_epoch
from lib.workloads import OURS, TRL

Row = dict[str, Any]
Images = torch.Tensor
LOGGED = {
    "jpeg_compressibility": rewards.jpeg_compressibility,
    "jpeg_incompressibility": rewards.jpeg_incompressibility,
    "colour": colour,
}
# of the noise of evaluations, the same for every seed and contender
EVALUATION_SEED = 12_345
# images are averaged down to so many pixels a side before they are compared
DIVERSITY_SIZE = 16


def main(argument: str, path: Path) -> None:
    spec = json.loads(argument)
    measured = {"learning": learn, "seconds": time_trl}[spec["bench"]]
    with tempfile.TemporaryDirectory() as folder:
        record = {**spec, **measured(spec, Path(folder))}
    record |= {**records.facts(spec["device_type"]), **records.versions("trl", "diffusers", "peft")}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(record, allow_nan=False))
    part.replace(path)


class RecordedReward:
    """A reward function that keeps the images it has scored, until `take`. Evaluations are not kept."""

    def __init__(self, name: str) -> None:
        self.reward = LOGGED.get(name) or rewards.load(name)
        self.keeps = True
        self.kept: list[tuple[Images, tuple[str, ...], Any]] = []

    def __call__(self, images: Images, prompts: tuple[str, ...], metadata: Any) -> Any:
        rewards, info = self.reward(images, prompts, metadata)
        if self.keeps:
            self.kept.append((images, tuple(prompts), rewards))
        return rewards, info

    def take(self) -> tuple[Images, tuple[str, ...], torch.Tensor]:
        """(images on the CPU, prompts, rewards [B]) scored since the last call."""
        images = torch.cat([images.detach().float().cpu() for images, _, _ in self.kept])
        prompts = tuple(prompt for _, prompts, _ in self.kept for prompt in prompts)
        rewards = torch.cat([torch.as_tensor(rewards).detach().float().cpu().flatten() for _, _, rewards in self.kept])
        self.kept.clear()
        return images, prompts, rewards


def learn(spec: Row, folder: Path) -> Row:
    """Trains until `spec["images"]` images have been scored, redrawn ones included."""
    reward = RecordedReward(spec["reward"])
    trainer = make_trainer(spec, folder, reward)
    epochs: list[Row] = []
    evaluations = [evaluation(trainer, spec, reward, 0, 0.0)] if spec["trainer"] == OURS else []
    images, seconds, processor_s, global_step, stopped = 0, 0.0, 0.0, 0, None
    while images < spec["images"] and stopped is None:
        began = time.process_time()
        try:
            global_step, epoch_s = timed_epoch(trainer, len(epochs), global_step)
        # a run whose weights or latents are no longer finite is a result; an error in the first epoch is a mistake
        except (RuntimeError, ValueError) as error:
            if not epochs:
                raise
            stopped = str(error)[:500]
            break
        processor_s += time.process_time() - began
        scored = reward.take()
        images, seconds = images + len(scored[0]), seconds + epoch_s
        so_far = {"images": images, "seconds": seconds, "processor_s": processor_s}
        epochs.append({**so_far, **figures(*scored), "log": logged(folder, len(epochs))})
        if spec["trainer"] == OURS and due(images, evaluations[-1]["images"], spec):
            evaluations.append(evaluation(trainer, spec, reward, images, seconds))
    return {"epochs": epochs, "evaluations": evaluations, "stopped": stopped, "peak_bytes": peak_bytes()}


def due(images: int, evaluated: int, spec: Row) -> bool:
    return images >= spec["images"] or images - evaluated >= spec["evaluate_every"]


def make_trainer(spec: Row, folder: Path, reward: RecordedReward) -> Any:
    settings = spec["settings"]
    epochs = math.ceil(spec["images"] / settings["sample_batch_size"] / settings["sample_num_batches_per_epoch"])
    made = {"model": spec["model"] or str(MODEL), "use_lora": spec["kind"] == "lora", "prompts": spec["prompts"]}
    of_run = {"seed": spec["seed"], "num_epochs": epochs}
    if spec["trainer"] == TRL:
        given = {"settings": {**trl_settings(settings), **of_run}, **made}
        trainer = make_trl(given, folder, reward)[0]
        warm_up(trainer.optimizer, settings.get("train_warmup_steps", 0))
        return trainer
    own = {"settings": {**config_settings(settings), **of_run}, "lora": lora_settings(settings), **made}
    return make_ours(own, folder, reward)[0]


def time_trl(spec: Row, folder: Path) -> Row:
    """Seconds of epochs of TRL's own package, for its curves that our trainer computes. The reward hardly matters."""
    settings = {**trl_settings(spec["settings"]), "seed": spec["seed"]}
    made = {"model": spec["model"] or str(MODEL), "use_lora": spec["kind"] == "lora", "prompts": spec["prompts"]}
    trainer = make_trl({"settings": settings, **made}, folder)[0]
    images = settings["sample_batch_size"] * settings["sample_num_batches_per_epoch"]
    # the first epoch warms up
    global_step, _ = timed_epoch(trainer, 0, 0)
    seconds, began = [], time.process_time()
    for epoch in range(1, spec["timed_epochs"] + 1):
        global_step, epoch_s = timed_epoch(trainer, epoch, global_step)
        seconds.append(epoch_s)
    each = images * len(seconds)
    processor_s = (time.process_time() - began) / each
    return {"epoch_s": seconds, "seconds_per_image": sum(seconds) / each, "processor_s_per_image": processor_s}


def warm_up(optimizer: Any, updates: int) -> None:
    """Raises the learning rate linearly over the first updates as our trainer does, for TRL, which has no warm-up."""
    inner = getattr(optimizer, "optimizer", optimizer)
    peaks, done = [group["lr"] for group in inner.param_groups], 0

    def set_rate(*_: Any) -> None:
        nonlocal done
        done += 1
        for group, peak in zip(inner.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, done / max(1, updates))

    inner.register_step_pre_hook(set_rate)


def figures(images: Images, prompts: tuple[str, ...], rewards: torch.Tensor | None) -> Row:
    """The trained reward's mean and standard deviation, the means of the logged rewards, and the diversity."""
    found: Row = {"rewards": {name: score(images, prompts, None)[0].mean().item() for name, score in LOGGED.items()}}
    if rewards is not None:
        spread = rewards.std().item() if len(rewards) > 1 else None
        found = {"reward": rewards.mean().item(), "reward_std": spread, **found}
    return {**found, "diversity": diversity(images, prompts)}


def diversity(images: Images, prompts: Sequence[str]) -> float | None:
    """The mean rms distance between two images [B, 3, H, W] of the same prompt, or None if no prompt has two.

    Images are averaged down to 16x16 first, so that noise and texture count little. Prompts have equal weights.
    """
    pixels = adaptive_avg_pool2d(images.float(), DIVERSITY_SIZE).flatten(1)
    distances = []
    for prompt in dict.fromkeys(prompts):
        same = pixels[torch.tensor([other == prompt for other in prompts])]
        if len(same) > 1:
            distances.append(torch.pdist(same).mean().item() / math.sqrt(pixels.shape[1]))
    return mean(distances) if distances else None


def logged(folder: Path, epoch: int) -> Row:
    """What our trainer logged for the epoch: its figures, and the means over its updates. Nothing for TRL."""
    path = folder / "run" / "metrics.jsonl"
    if not path.exists():
        return {}
    lines = [line for line in map(json.loads, path.read_text("utf-8").splitlines()) if line.get("epoch") == epoch]
    updates = [numbers(line) for line in lines if line["kind"] == "update"]
    names = {name: None for update in updates for name in update}
    means = {name: mean(update[name] for update in updates if name in update) for name in names}
    return {**means, **next((numbers(line) for line in lines if line["kind"] == "epoch"), {})}


def numbers(line: Row) -> Row:
    return {n: v for n, v in line.items() if type(v) in (int, float) and math.isfinite(v)}


def evaluation(trainer: Any, spec: Row, reward: RecordedReward, images: int, seconds: float) -> Row:
    """Figures of images of fixed noise: of prompts that are trained on, and of those that are held out."""
    found: Row = {"images": images, "seconds": seconds}
    reward.keeps = False
    for name, prompts in (("trained", spec["prompts"]), ("held_out", spec["held_out"])):
        half = max(1, spec["evaluation_images"] // 2)
        # two images a prompt where there are enough, for the diversity
        chosen = prompts[: max(1, half // 2)]
        repeated = tuple(prompt for prompt in chosen for _ in range(half // len(chosen)))
        drawn, scores = trainer.evaluate(repeated, ({},) * len(repeated), seed=EVALUATION_SEED)
        found[name] = figures(drawn, repeated, scores)
    reward.keeps = True
    return found


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
