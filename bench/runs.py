"""Runs one trainer in a process of its own, for `throughput.py`, and prints what it took as its last line.

    python bench/runs.py SPEC        SPEC is JSON, see `spec_of` in rounds.py

Epochs are timed from outside with the device's queue empty at both ends. The parts of one of ours are those that it
writes to metrics.jsonl, TRL's are timed here, the queue empty at both ends too.
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

import paths  # noqa: F401
import torch
from rounds import LEARNED

from ddpo_fast.rewards import jpeg_compressibility

Figures = dict[str, Any]
PROFILED = 15


def main(argument: str) -> None:
    spec = json.loads(argument)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer, last_epoch = {"ours": ours, "trl": theirs}[spec["trainer"]](spec, Path(folder))
        startup_s = time.perf_counter() - began
        figures = measured(trainer, last_epoch, spec["warmup"], spec["epochs"], spec["profiled"])
    print(json.dumps({"startup_s": startup_s, **figures}))


def measured(
    trainer: Any, last_epoch: Callable[[], Figures], warmup: int, epochs: int, profiled: bool
) -> dict[str, Any]:
    global_step, found = 0, []
    for epoch in range(warmup):
        global_step, figures = timed_epoch(trainer, last_epoch, epoch, global_step)
        found.append(figures)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with Profile(profiled) as profile:
        for epoch in range(warmup, warmup + epochs):
            global_step, figures = timed_epoch(trainer, last_epoch, epoch, global_step)
            found.append(figures)
    return {
        "warmup_s": sum(figures["epoch_s"] for figures in found[:warmup]),
        "epochs": found[warmup:],
        "peak_bytes": peak_bytes(),
        "profile": profile.rows(),
    }


def timed_epoch(
    trainer: Any, last_epoch: Callable[[], Figures], epoch: int, global_step: int
) -> tuple[int, dict[str, Any]]:
    synchronize()
    began = time.perf_counter()
    global_step = trainer.step(epoch, global_step)
    synchronize()
    return global_step, {"epoch_s": time.perf_counter() - began, **last_epoch()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """The most memory at a time: of the device in the measured epochs, or of the whole process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PromptsInTurn:
    """Draws from a generator of its own: trainers that ask in the same order get the same prompts."""

    def __init__(self, listed: list[str], seed: int) -> None:
        self.listed, self.random = listed, random.Random(seed)

    def __call__(self) -> tuple[str, dict[str, Any]]:
        return self.random.choice(self.listed), {}


def ours(spec: dict[str, Any], folder: Path) -> tuple[Any, Callable[[], Figures]]:
    from ddpo_fast.config import DDPOConfig
    from ddpo_fast.pipeline import DefaultDDPOStableDiffusionPipeline
    from ddpo_fast.trainer import DDPOTrainer

    config = DDPOConfig(output_dir=str(folder / "run"), **spec["settings"])
    pipeline = DefaultDDPOStableDiffusionPipeline(spec["model"], use_lora=spec["use_lora"])
    trainer = DDPOTrainer(config, jpeg_compressibility, PromptsInTurn(spec["prompts"], config.seed), pipeline)

    def last_epoch() -> Figures:
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
        epoch = [line for line in lines if line["kind"] == "epoch"][-1]
        updates = [line for line in lines if line["kind"] == "update" and line["epoch"] == epoch["epoch"]]
        times = {name: epoch[name] for name in ("sample_s", "reward_s", "train_s")}
        return {**times, **learned([epoch, *updates])}

    return trainer, last_epoch


def theirs(spec: dict[str, Any], folder: Path) -> tuple[Any, Callable[[], Figures]]:
    from accelerate import PartialState

    # TRL logs before accelerate has a state, and stops there
    PartialState(cpu=not torch.cuda.is_available())
    warnings.simplefilter("ignore")
    import trl

    config = trl.DDPOConfig(project_kwargs={"project_dir": str(folder)}, **spec["settings"])
    pipeline = trl.DefaultDDPOStableDiffusionPipeline(spec["model"], use_lora=spec["use_lora"])
    trainer = trl.DDPOTrainer(config, jpeg_compressibility, PromptsInTurn(spec["prompts"], config.seed), pipeline)
    seconds: dict[str, float] = defaultdict(float)
    for name, part in (("_generate_samples", "sample_s"), ("compute_rewards", "reward_s")):
        time_method(trainer, name, part, seconds)
    time_method(trainer, "_train_batched_samples", "train_s", seconds)
    logged: list[dict[str, Any]] = []
    trainer.accelerator.log = lambda values, step=None, **_: logged.append(values)

    def last_epoch() -> Figures:
        figures = {**seconds, **learned(logged)}
        seconds.clear()
        logged.clear()
        return figures

    return trainer, last_epoch


def time_method(trainer: Any, name: str, part: str, seconds: dict[str, float]) -> None:
    """Adds the time of each call of a method to `seconds[part]`."""
    method = getattr(trainer, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        synchronize()
        began = time.perf_counter()
        result = method(*args, **kwargs)
        synchronize()
        seconds[part] += time.perf_counter() - began
        return result

    setattr(trainer, name, timed)


def learned(records: list[dict[str, Any]]) -> Figures:
    """Means of the figures that say what an epoch did."""
    values = {name: [float(record[name]) for record in records if name in record] for name in LEARNED}
    return {name: mean(found) for name, found in values.items() if found}


class Profile:
    """torch.profiler around what it encloses, or nothing."""

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
        """The kernels (on a CPU the ops) with the most time of their own, then all of them together."""
        if self.profiler is None:
            return []
        averages, on_gpu = self.profiler.key_averages(), torch.cuda.is_available()
        if on_gpu:
            seen = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
            times = [(e.self_device_time_total / 1e6, e) for e in seen]
        else:
            times = [(e.self_cpu_time_total / 1e6, e) for e in averages]
        total, calls = sum(seconds for seconds, _ in times), sum(e.count for _, e in times)
        longest = sorted(times, key=lambda pair: -pair[0])[:PROFILED]
        found = [(e.key, e.count, seconds) for seconds, e in longest] + [("all", calls, total)]
        return [{"name": n, "calls": c, "self_s": s, "share": s / total, "on_device": on_gpu} for n, c, s in found]


if __name__ == "__main__":
    main(sys.argv[1])
