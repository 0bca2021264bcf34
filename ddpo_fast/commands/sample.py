"""`ddpo-fast sample`: a grid of images by the base model and by the trained one, from the same noise.

Shapes: B prompts, H x W pixels.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ddpo_fast import rewards
from ddpo_fast.commands import recorded_run
from ddpo_fast.commands.early_checks import check_can_write
from ddpo_fast.commands.options import RunArguments, from_options
from ddpo_fast.commands.reward_options import RewardArguments
from ddpo_fast.commands.train import make_pipeline
from ddpo_fast.config import SAMPLING_FIELDS, DDPOConfig
from ddpo_fast.prompts import draw_prompts, load_prompts
from ddpo_fast.run_folder import checkpoint, pictures

# images that one call of the pipeline samples
BATCH_SIZE = 8


def run(options: argparse.Namespace) -> None:
    """Draws a trained run's images below the base model's, from the same noise."""
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
    checkpoint.verify(found)
    path = picture_path(options, checkpoint.run_folder_of(found))

    # Read what the run recorded. Only the model, the prompts, the reward and the settings of sampling are used.
    recorded = recorded_run.read(str(found))
    if options.reward:
        recorded.forget_how_rewards_are_made()
    given = {name for name, value in vars(options).items() if value}
    recorded.check_trust(given, options.trust_run, used=["prompts"])
    saved = recorded.options
    DDPOConfig(**{name: saved[name] for name in SAMPLING_FIELDS if name in saved}).check()
    model = RunArguments(**{f.name: saved[f.name] for f in fields(RunArguments) if f.name in saved})
    reward = reward_of(recorded, options, given)
    random.seed(options.seed)
    prompts, metadata = draw_prompts(load_prompts(options.prompts or model.prompts), options.num_images)

    # The base model samples first, because the trained weights are then loaded into the same networks.
    pipeline = make_pipeline(model)
    window = saved.get("sde_window")
    pipeline.family.use(saved.get("height"), saved.get("width"), 1.0, saved.get("sampler", "auto"), window)
    # a model is loaded as it is stored, and half precision would be another image
    pipeline.sd_pipeline.to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    base = draw(pipeline, prompts, saved, options.seed)
    pipeline.load_checkpoint([pipeline.get_trainable_layers()], str(found))
    trained = draw(pipeline, prompts, saved, options.seed)

    # the rewards are the captions
    rows = [
        (name, images, rewards.score(reward, images, prompts, metadata)[0].tolist() if reward else None)
        for name, images in (("base", base), ("trained", trained))
    ]
    pictures.draw_grid(prompts, rows, path)
    print(f"drew {path}")


def picture_path(options: argparse.Namespace, folder: Path) -> Path:
    """Where the grid goes. Raises `ValueError` for a file that cannot be written or is there already."""
    path = options.output
    if path is None:
        numbers = itertools.count(2)
        path = folder / "samples.png"
        # `exists` is false for a broken link, through which the picture would be written elsewhere
        while os.path.lexists(path):
            path = folder / f"samples_{next(numbers)}.png"
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
