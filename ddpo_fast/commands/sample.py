"""`ddpo-fast sample`: images by the base model and by a run's checkpoints, from the same noise.

Shapes: B prompts, H x W pixels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ddpo_fast import rewards
from ddpo_fast.commands import recorded_run
from ddpo_fast.commands.early_checks import check_can_write
from ddpo_fast.commands.options import RunArguments, from_options
from ddpo_fast.commands.reward_options import RewardArguments
from ddpo_fast.commands.train import make_pipeline
from ddpo_fast.config import SAMPLING_FIELDS, DDPOConfig
from ddpo_fast.engine.make_engine import compute_dtype
from ddpo_fast.prompts import draw_prompts, load_prompts
from ddpo_fast.rewards.pixels import as_uint8
from ddpo_fast.run_folder import checkpoint, pictures
from ddpo_fast.run_folder.epoch_scores import EpochScores
from ddpo_fast.run_folder.sample_files import SAMPLES

# images that one call of the pipeline samples
BATCH_SIZE = 8


def run(options: argparse.Namespace) -> None:
    """Draws the images of a run's checkpoints below the base model's, from the same noise."""
    # Check the options' ranges, the checkpoint, and the picture's path.
    for name, least in (("num_images", 1), ("seed", 0)):
        if getattr(options, name) < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {getattr(options, name)} but must be a whole number of at least {least}")
    if options.seed >= 2**32:
        raise ValueError(f"--seed is {options.seed} but must be a whole number below {2**32}")
    try:
        found = checkpoint.find(options.run)
    except ValueError as error:
        # the message names `resume_from`, the option of `train`
        raise ValueError(str(error).replace("resume_from is", "run is", 1)) from None
    if found is None:
        raise ValueError(f"{options.run!r} has no checkpoint yet: train it for at least save_freq epochs")
    chosen = chosen_checkpoints(options, found)
    for path in chosen.values():
        checkpoint.verify(path)
    as_grid = options.format == "grid"
    folder = checkpoint.run_folder_of(found)
    target = picture_path(options, folder) if as_grid else images_folder(options, folder)

    # Read what the run recorded. Only the model, the prompts, the reward and the settings of sampling are used.
    recorded = recorded_run.read(str(found))
    if options.reward:
        recorded.forget_how_rewards_are_made()
    given = {name for name, value in vars(options).items() if value}
    recorded.check_trust(given, options.trust_run, used=["prompts"])
    saved = recorded.options
    sampling = DDPOConfig(**{name: saved[name] for name in SAMPLING_FIELDS if name in saved})
    model = RunArguments(**{f.name: saved[f.name] for f in fields(RunArguments) if f.name in saved})
    reward = reward_of(recorded, options, given)
    random.seed(options.seed)
    prompts, metadata = draw_prompts(load_prompts(options.prompts or model.prompts), options.num_images)

    # The base model samples first, because the trained weights are then loaded into the same networks.
    pipeline = make_pipeline(model)
    pipeline.family.use(*sampling.image_sizes[0], 1.0, sampling.sampler, sampling.sde_window)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place(pipeline, device, precision_of(saved, device))
    drawn = {"base": draw(pipeline, prompts, saved, options.seed)}
    for name, path in chosen.items():
        pipeline.load_checkpoint([pipeline.get_trainable_layers()], str(path))
        place(pipeline, device, precision_of(saved, device))
        drawn[name] = draw(pipeline, prompts, saved, options.seed)

    # the rewards are the captions
    rows = [
        (name, images, rewards.score(reward, images, prompts, metadata)[0].tolist() if reward else None)
        for name, images in drawn.items()
    ]
    if as_grid:
        pictures.draw_grid(prompts, rows, target)
    else:
        write_images(target, prompts, rows)
    print(f"drew {target}")


def chosen_checkpoints(options: argparse.Namespace, found: Path) -> dict[str, Path]:
    """The checkpoints that --checkpoint means, by the names of their rows, in order of their epochs.

    Args:
        found: the newest one, or the one that the user named.

    Raises `ValueError` for one that the run does not have.
    """
    wanted = options.checkpoint
    if wanted is None:
        return {"trained": found}
    present = {checkpoint.epochs_of(path): path for path in checkpoint.list_in(found.parent)}
    if not present:
        raise ValueError(f"--checkpoint is {wanted!r}, but {options.run!r} is no run's folder: leave it out")
    if wanted == "all":
        numbers = list(present)
    elif wanted == "last":
        numbers = [max(present)]
    elif wanted == "best":
        scores = EpochScores(held_out=False)
        scores.load_state_dict(checkpoint.read_state(present[max(present)]).get("scores", []))
        best = scores.best(present)
        if best is None:
            raise ValueError(
                f"--checkpoint is 'best', but no checkpoint of {options.run!r} has a score: name its epochs"
            )
        numbers = [best]
    else:
        words = [word.strip() for word in wanted.split(",")]
        if not all(word.isdecimal() for word in words):
            raise ValueError(
                f"--checkpoint is {wanted!r} but must be all, best, last or numbers of epochs, as in 10,20"
            )
        numbers = sorted({int(word) for word in words})
    for number in numbers:
        if number not in present:
            raise ValueError(
                f"--checkpoint names {number}, and {options.run!r} has the checkpoints {', '.join(map(str, present))}: "
                "choose among these"
            )
    return {f"epoch {number}": present[number] for number in numbers}


def precision_of(saved: dict[str, Any], device: torch.device) -> torch.dtype:
    """The precision that the run sampled in; fp32 in place of fp16 on a CPU, which cannot compute in that."""
    dtype = compute_dtype(saved.get("mixed_precision") or "no")
    return torch.float32 if device.type == "cpu" and dtype == torch.float16 else dtype


def place(pipeline: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Moves the networks to the device, in the precisions that they have in a run."""
    family = pipeline.family
    pipeline.unet.to(device, dtype)
    for name, part in family.frozen_parts.items():
        part.to(device, family.dtype_of(name, getattr(part, "config", {}), dtype))


def first_free(path: Path) -> Path:
    """The path, or the first one with a number from 2 on that is not there."""
    numbers, free = itertools.count(2), path
    # `exists` is false for a broken link, through which the output would be written elsewhere
    while os.path.lexists(free):
        free = path.with_name(f"{path.stem}_{next(numbers)}{path.suffix}")
    return free


def images_folder(options: argparse.Namespace, run: Path) -> Path:
    """The folder of --format images. Raises `ValueError` for one that cannot be written or holds something."""
    folder = options.output
    if folder is None:
        folder = first_free(run / "samples_images")
    folder = folder.expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output is {str(folder)!r}, which is a file: with --format images name a folder")
    if folder.exists() and any(folder.iterdir()) and not options.overwrite:
        raise ValueError(f"--output is {str(folder)!r}, which is not empty: choose another folder, or add --overwrite")
    if not folder.parent.is_dir():
        raise ValueError(f"--output is {str(folder)!r}, and there is no folder {str(folder.parent)!r}: make it first")
    check_can_write(folder.parent, "--output")
    return folder


def write_images(folder: Path, prompts: Sequence[str], rows: Sequence[pictures.Row]) -> None:
    """Writes each row into a folder of its name: 000.png, ... and samples.json with prompts and rewards."""
    for name, images, scores in rows:
        own = folder / name.replace(" ", "_")
        own.mkdir(parents=True, exist_ok=True)
        entries: list[dict[str, Any]] = []
        for i, pixels in enumerate(as_uint8(images)):
            file = f"{i:03d}.png"
            Image.fromarray(pixels).save(own / file)
            entries.append({"file": file, "prompt": prompts[i], "reward": scores[i] if scores else None})
        text = json.dumps({"name": name, "samples": entries}, indent=1, ensure_ascii=False)
        (own / SAMPLES).write_text(text + "\n", encoding="utf-8")


def picture_path(options: argparse.Namespace, folder: Path) -> Path:
    """Where the grid goes. Raises `ValueError` for a file that cannot be written or is there already."""
    path = options.output
    if path is None:
        path = first_free(folder / "samples.png")
    path = path.expanduser()
    pictures.check_ending(path, "--output")
    if path.is_dir():
        raise ValueError(f"--output is {str(path)!r}, which is a folder: add a file's name")
    if path.exists() and not options.overwrite:
        raise ValueError(f"--output is {str(path)!r}, which exists: choose another name, or add --overwrite")
    if not path.parent.is_dir():
        raise ValueError(f"--output is {str(path)!r}, and there is no folder {str(path.parent)!r}: make it first")
    check_can_write(path.parent, "--output")
    return path


def reward_of(recorded: recorded_run.RecordedRun, options: argparse.Namespace, given: set[str]) -> Any:
    """The reward function for the captions; prints a line and returns None if it is the run's and not trusted."""
    try:
        recorded.check_trust(given, options.trust_run, used=["reward", *recorded_run.SERVERS])
    except ValueError:
        print(
            f"no rewards are shown: the run's reward {recorded.options['reward']!r} is used only with --trust_run; "
            "add that, or --reward for another"
        )
        return None
    spec = options.reward or recorded.options.get("reward")
    # what is not on the command line is as it was in the run
    made = from_options(RewardArguments, options)
    for option in fields(RewardArguments):
        if option.name in recorded.options and getattr(made, option.name) == getattr(RewardArguments(), option.name):
            setattr(made, option.name, recorded.options[option.name])
    return made.load(spec)[0] if spec else None


def draw(pipeline: Any, prompts: tuple[str, ...], saved: dict[str, Any], seed: int) -> torch.Tensor:
    """An image for each prompt, sampled with the run's settings: [B, 3, H, W] in fp32 in [0, 1] on the CPU."""
    settings = {f.name: saved.get(f.name, f.default) for f in fields(DDPOConfig)}
    generator = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = list(prompts[start : start + BATCH_SIZE])
        drawn = pipeline(
            prompt=batch,
            negative_prompt=pipeline.family.negatives(settings["negative_prompts"], len(batch)),
            num_inference_steps=settings["sample_num_steps"],
            guidance_scale=settings["sample_guidance_scale"],
            eta=settings["sample_eta"],
            generator=generator,
            output_type="pt",
        )
        images.append(drawn.images.float().cpu())
    return torch.cat(images)
