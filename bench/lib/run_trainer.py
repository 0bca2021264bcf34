"""Trains with one trainer and prints as its last line, in JSON, what the epochs took.

    python -m lib.run_trainer SPEC        SPEC is JSON, see `run_spec` in trainer_process.py

Epochs are timed from outside the trainer, with the device's queue empty at both ends. The times of sampling, reward and
training are those that our trainer writes to metrics.jsonl; TRL's trainer writes none, so its methods are timed here,
with the queue empty at both ends too.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ddpo_fast.rewards import jpeg_compressibility
from lib.trainer_process import Figures
from lib.workloads import LEARNING_FIGURES

# how many ops or kernels a profile lists
PROFILED = 15
Trainer = Any


def main(argument: str) -> None:
    spec = json.loads(argument)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        make = {"ours": make_ours, "trl": make_trl}[spec["trainer"]]
        trainer, epoch_figures = make(spec, Path(folder))
        startup_s = time.perf_counter() - began
        figures = measure(trainer, epoch_figures, spec["warmup"], spec["epochs"], spec["profiled"])
    print(json.dumps({"startup_s": startup_s, **figures}))


def measure(
    trainer: Trainer, epoch_figures: Callable[[], Figures], warmup: int, epochs: int, profiled: bool
) -> Figures:
    """Figures of `epochs` epochs after `warmup` uncounted ones; `epoch_figures` says what the last epoch did."""
    global_step, found = 0, []

    def run(numbers: range) -> None:
        nonlocal global_step
        for epoch in numbers:
            global_step, seconds = timed_epoch(trainer, epoch, global_step)
            found.append({"epoch_s": seconds, **epoch_figures()})

    run(range(warmup))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with Profile(profiled) as profile:
        run(range(warmup, warmup + epochs))
    return {
        "warmup_s": sum(figures["epoch_s"] for figures in found[:warmup]),
        "epochs": found[warmup:],
        "peak_bytes": peak_bytes(),
        "profile": profile.rows(),
    }


def timed_epoch(trainer: Trainer, epoch: int, global_step: int) -> tuple[int, float]:
    """(the global step after the epoch, seconds)."""
    synchronize()
    began = time.perf_counter()
    global_step = trainer.step(epoch, global_step)
    synchronize()
    return global_step, time.perf_counter() - began


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """The peak of memory: what PyTorch allocated on the GPU in the measured epochs, or the whole process's on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts ru_maxrss in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class SeededPrompts:
    """A prompt function with a generator of its own: trainers that draw in the same order get the same prompts."""

    def __init__(self, prompts: list[str], seed: int) -> None:
        self.prompts, self.random = prompts, random.Random(seed)

    def __call__(self) -> tuple[str, dict[str, Any]]:
        return self.random.choice(self.prompts), {}


def make_ours(
    spec: dict[str, Any], folder: Path, reward: Callable[..., Any] = jpeg_compressibility
) -> tuple[Trainer, Callable[[], Figures]]:
    """(our trainer, a function that returns the last epoch's figures)."""
    from ddpo_fast.config import DDPOConfig
    from ddpo_fast.pipeline import DefaultDDPOStableDiffusionPipeline
    from ddpo_fast.trainer import DDPOTrainer

    config = DDPOConfig(output_dir=str(folder / "run"), **spec["settings"])
    pipeline = DefaultDDPOStableDiffusionPipeline(spec["model"], use_lora=spec["use_lora"], **spec.get("lora", {}))
    trainer = DDPOTrainer(config, reward, SeededPrompts(spec["prompts"], config.seed), pipeline)

    def epoch_figures() -> Figures:
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
        epoch = [line for line in lines if line["kind"] == "epoch"][-1]
        updates = [line for line in lines if line["kind"] == "update" and line["epoch"] == epoch["epoch"]]
        times = {name: epoch[name] for name in ("sample_s", "reward_s", "train_s")}
        return {**times, **mean_figures([epoch, *updates])}

    return trainer, epoch_figures


def make_trl(
    spec: dict[str, Any], folder: Path, reward: Callable[..., Any] = jpeg_compressibility
) -> tuple[Trainer, Callable[[], Figures]]:
    """(TRL's trainer, a function that returns the last epoch's figures)."""
    from accelerate import PartialState

    # TRL logs before it makes an accelerator, and accelerate's logger raises an error where there is no state yet
    PartialState(cpu=not torch.cuda.is_available())
    warnings.simplefilter("ignore")
    import trl

    config = trl.DDPOConfig(project_kwargs={"project_dir": str(folder)}, **spec["settings"])
    pipeline = trl.DefaultDDPOStableDiffusionPipeline(spec["model"], use_lora=spec["use_lora"])
    trainer = trl.DDPOTrainer(config, reward, SeededPrompts(spec["prompts"], config.seed), pipeline)
    seconds: dict[str, float] = defaultdict(float)
    time_method(trainer, "_generate_samples", "sample_s", seconds)
    time_method(trainer, "compute_rewards", "reward_s", seconds)
    time_method(trainer, "_train_batched_samples", "train_s", seconds)
    logged: list[dict[str, Any]] = []
    trainer.accelerator.log = lambda values, step=None, **_: logged.append(values)

    def epoch_figures() -> Figures:
        figures = {**seconds, **mean_figures(logged)}
        seconds.clear()
        logged.clear()
        return figures

    return trainer, epoch_figures


def time_method(trainer: Trainer, name: str, part: str, seconds: dict[str, float]) -> None:
    """Replaces a method by one that adds the time of each call to `seconds[part]`."""
    method = getattr(trainer, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        synchronize()
        began = time.perf_counter()
        result = method(*args, **kwargs)
        synchronize()
        seconds[part] += time.perf_counter() - began
        return result

    setattr(trainer, name, timed)


def mean_figures(logged: list[dict[str, Any]]) -> Figures:
    """Means of those figures that say whether two trainers learned the same."""
    values = {name: [float(line[name]) for line in logged if name in line] for name in LEARNING_FIGURES}
    return {name: mean(found) for name, found in values.items() if found}


class Profile:
    """torch.profiler around a `with` block, or nothing if it is not wanted."""

    def __init__(self, wanted: bool) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities) if wanted else None

    def __enter__(self) -> Profile:
        if self.profiler is not None:
            self.profiler.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.profiler is not None:
            self.profiler.__exit__(*exception)

    def rows(self) -> list[dict[str, Any]]:
        """The kernels (on a CPU the ops) with the most time of their own, then the sum over all of them."""
        if self.profiler is None:
            return []
        averages, on_gpu = self.profiler.key_averages(), torch.cuda.is_available()
        if on_gpu:
            kernels = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
            times = [(e.self_device_time_total / 1e6, e) for e in kernels]
        else:
            times = [(e.self_cpu_time_total / 1e6, e) for e in averages]
        total, calls = sum(seconds for seconds, _ in times), sum(e.count for _, e in times)
        longest = sorted(times, key=lambda pair: -pair[0])[:PROFILED]
        found = [(e.key, e.count, seconds) for seconds, e in longest] + [("all", calls, total)]
        return [{"name": n, "calls": c, "self_s": s, "share": s / total, "on_device": on_gpu} for n, c, s in found]


if __name__ == "__main__":
    main(sys.argv[1])
