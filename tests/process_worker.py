"""`process_worker.py MODEL FOLDER CASES.json...`: trains each case, under torchrun or by itself.

By itself it takes a file of cases for one process, then one for two, and so on, and forks: packages are imported once.

A case has a name and settings of a run. Its random states, samples and weights are saved in FOLDER/NAME. With `like` it
samples what the processes of that run sampled, one after the other; with `resumes` it resumes that run; with `model` it
trains that model instead of MODEL.
"""

from __future__ import annotations

import gc
import json
import multiprocessing.connection
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed  # noqa: F401, imported before the processes are forked
import torch
from accelerate.utils import gather_object
from compare_runs import Weights, trained_weights
from gradient_sums import measure
from test_groups import FlatAtFirst, Numbered, keep_trained
from tiny_run import SETTINGS, build_trainer

from ddpo_fast import DDPOTrainer
from ddpo_fast.prompts import load_prompts
from ddpo_fast.random_state import random_state, restore_random_state
from ddpo_fast.rewards import SeveralRewards
from ddpo_fast.trajectory import Trajectory

LINEAR = torch.nn.functional.linear
BATCHES = SETTINGS["sample_num_batches_per_epoch"]


def contrast(images, prompts, metadata):
    """A reward of other numbers than `tiny_run.brightness`."""
    return 100 * images.std((1, 2, 3)), {}


def main() -> None:
    torch.set_num_threads(1)
    model, folder, *files = sys.argv[1:]
    if "RANK" in os.environ:
        train(model, Path(folder), Path(files[0]))
        return
    # DeepSpeed collects garbage at each start, which takes half a second among all that the imports have made
    gc.freeze()
    for processes, file in reversed(list(enumerate(files, 1))):
        fork(processes, model, Path(folder), Path(file))


def fork(processes: int, *arguments: Any) -> None:
    """Trains cases in forked processes with the environment variables that torchrun gives. Raises if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    forked = multiprocessing.get_context("fork")
    started = []
    for rank in range(processes):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        variables = place | {name: str(number) for name, number in numbers.items()} if processes > 1 else {}
        with mock.patch.dict(os.environ, variables):
            started.append(forked.Process(target=train, args=arguments))
            started[-1].start()
    waiting = started
    while waiting:
        multiprocessing.connection.wait([process.sentinel for process in waiting])
        waiting = [process for process in waiting if process.is_alive()]
        if any(process.exitcode for process in started):
            for process in waiting:
                process.terminate()
            sys.exit("a process failed")


def train(model: str, folder: Path, file: Path) -> None:
    cases = json.loads(file.read_text())
    for name, settings in cases.items():
        if name.startswith("groups"):
            draw_groups(model, folder / name, **settings)
        elif name == "gradients":
            measure(folder / name)
        else:
            run(model, folder, name, settings)


def run(model: str, folder: Path, name: str, settings: dict) -> None:
    like, model = settings.pop("like", None), settings.pop("model", model)
    epochs, resumed = settings.pop("epochs", None), settings.pop("resumes", None)
    if resumed:
        settings["resume_from"] = str(folder / resumed / "checkpoints" / "checkpoint_1")
    settings = {"per_prompt_stat_tracking": True, **settings}
    prompts = load_prompts("animals") if like is None else repeated_prompts(folder / like)
    trainer = build_trainer(model, folder / name, prompts=prompts, sample_prompts="animals", **settings)
    process = trainer.accelerator.process_index
    if like is None:
        torch.save(random_state(), folder / name / f"states_{process}.pt")
    else:
        draw_like(trainer, folder / like)
    kept = {}
    with mock.patch.object(Trajectory, "with_advantages", first_epoch_kept_in(kept, trainer)):
        trainer.train(epochs)
    kept["linear_is_torchs"] = torch.nn.functional.linear is LINEAR
    kept["advantages"] = trainer.accelerator.gather(kept["advantages"].to(trainer.accelerator.device))
    kept["trail"] = trainer.accelerator.gather(kept["trail"])
    if isinstance(trainer.reward_fn, SeveralRewards):
        kept["spreads"] = trainer.reward_fn.state_dict()["spreads"]
    kept["drawn"] = gather_object(kept["drawn"])
    kept["end"] = whole_weights(trainer)
    kept.setdefault("weights", kept["end"])
    if trainer.accelerator.is_main_process:
        torch.save(kept, folder / name / "result.pt")
    trainer.save_model()


def whole_weights(trainer: DDPOTrainer) -> Weights:
    """The trained weights, on all processes: all of them take part."""
    with trainer.engine.exact():
        return trained_weights(trainer)


def first_epoch_kept_in(kept: dict, trainer: DDPOTrainer) -> Callable:
    """`Trajectory.with_advantages`, which keeps the first epoch's latents, advantages and prompts of this process.

    In the second epoch it keeps the weights, which are those that the first one ended with.
    """
    with_advantages = Trajectory.with_advantages

    def keep(trajectory, advantages):
        if "trail" in kept:
            kept.setdefault("weights", whole_weights(trainer))
        kept.setdefault("trail", trajectory.trail)
        kept.setdefault("advantages", advantages)
        kept.setdefault("drawn", list(trajectory.prompts))
        kept.setdefault("prompts", len(trainer.stat_tracker.get_stats()))
        return with_advantages(trajectory, advantages)

    return keep


def draw_groups(model: str, folder: Path, **settings: Any) -> None:
    """Trains on groups of which only those of the second process have no spread; saves what each trained on."""
    process = int(os.environ["RANK"])
    trainer = build_trainer(model, folder, reward=FlatAtFirst(process), prompts=Numbered(), **settings)
    kept = keep_trained(trainer)
    trainer.train()
    found = {"prompts": kept[0].prompts, "advantages": kept[0].advantages.mean(1).tolist()}
    (folder / f"{process}.json").write_text(json.dumps(found))


def repeated_prompts(other: Path) -> Callable:
    """A prompt function that draws what another run's processes drew in the first epoch, one after the other."""
    drawn = iter(torch.load(other / "result.pt", weights_only=True)["drawn"])
    return lambda: (next(drawn), {})


def draw_like(trainer: DDPOTrainer, other: Path) -> None:
    """Makes the trainer take noise for the first epoch from the random states of another run's processes, in turn."""
    draw, drawn = trainer.rollout.draw, []

    def draw_as_another(*arguments):
        process, batch = divmod(len(drawn), BATCHES)
        if batch == 0:
            states = torch.load(other / f"states_{process}.pt", weights_only=True)
            restore_random_state(states)
        drawn.append(batch)
        return draw(*arguments)

    trainer.rollout.draw = draw_as_another


if __name__ == "__main__":
    main()
