"""`ddpo-fast train`."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddpo_fast import rewards
from ddpo_fast.commands import before_after, earlier_run, plan
from ddpo_fast.commands.early_checks import check_before_loading, try_reward
from ddpo_fast.commands.options import RunArguments, check_given, filled, given_options, train_parser
from ddpo_fast.config import DDPOConfig
from ddpo_fast.pipeline import DefaultDDPOStableDiffusionPipeline
from ddpo_fast.prompts import PromptFunction, draw_prompts, existing, load_prompts
from ddpo_fast.run_folder import checkpoint, pictures
from ddpo_fast.run_folder.resume_checks import refuse_changes
from ddpo_fast.run_folder.run_log import default_folder, output_folder
from ddpo_fast.trainer import DDPOTrainer

SHOWN_PROMPTS = 8


def run(arguments: Sequence[str]) -> None:
    """Trains as the options say, and leaves reports and the final model in the output folder."""
    options, config = read_options(arguments)
    # the module of a reward may change the working directory
    for name in ("output_dir", "logdir"):
        if folder := getattr(config, name):
            setattr(config, name, str(Path(folder).expanduser().absolute()))
    configs = check_before_loading(options, config)
    reward_function, prompt_function = rewards.load_reward(options.reward), load_prompts(options.prompts)
    random.seed(config.seed)
    shown = distinct_prompts(prompt_function, SHOWN_PROMPTS)
    try_reward(reward_function, shown, configs.image_size)
    if config.auto_memory:
        plan.apply_auto_memory(options, config, "cuda" if torch.cuda.is_available() else "cpu")
    trainer = DDPOTrainer(config, reward_function, prompt_function, make_pipeline(options))
    trainer.run_settings.update(function_settings(options))
    trainer.run_log.write_config(trainer.run_settings)

    def say(line: str) -> None:
        if trainer.accelerator.is_main_process:
            print(line, flush=True)

    say(config.batch_arithmetic(trainer.accelerator.num_processes))
    say(f"writing to {trainer.output_dir}")
    before = before_after.begin(trainer, *shown)
    trainer.train()
    with trainer.finishing():
        # what was trained is safe before anything else is tried
        trainer.save_model()
        images, scores = trainer.evaluate(*shown)
        drawn = trainer.accelerator.is_main_process and pictures.attempt(
            before.draw, trainer.output_dir, shown[0], images, scores
        )
    say(f"reward of the shown images: {before.rewards.mean():.3f} {before.label}, {scores.mean():.3f} after")
    where = f"see {drawn.name} and rewards.png in {trainer.output_dir}; " if drawn else ""
    say(f"{where}the model is in {trainer.output_dir / 'final'}")
    if config.push_to_hub:
        say(f"pushed to {trainer.push_to_hub()}")
    trainer.accelerator.end_training()


def read_options(arguments: Sequence[str]) -> tuple[RunArguments, DDPOConfig]:
    """The options, with the settings of the run that `--resume_from` names as defaults.

    Raises `ValueError` for options that are wrong or contradict each other or that run.
    """
    parser, given = train_parser(), given_options(arguments)
    first = parser.parse(arguments)
    earlier = earlier_run.read(first.resume_from) if first.resume_from else None
    if earlier is not None:
        earlier.check_trust(given, first.trust_run)
        parser.set_defaults(**earlier.options)
    namespace = parser.parse(arguments)
    if namespace.mixed_precision is None:
        namespace.mixed_precision = default_precision()
    options = filled(RunArguments, namespace)
    if earlier is not None:
        earlier_run.check_same_kind(earlier, given, options)
    check_given(given, options.full_finetune)
    make_absolute(options, namespace)
    config = filled(DDPOConfig, namespace)
    if "exp_name" not in given:
        # the default folder's name says what is trained
        config.exp_name = options.reward.replace(":", ".")
    if earlier is not None:
        if given & {"logdir", "run_name", "exp_name"} and not config.output_dir:
            # a run of its own from there on
            config.output_dir = str(default_folder(config))
        in_place = checkpoint.continues_in(output_folder(config), config.resume_from)
        present = {"reward": options.reward, "prompts": options.prompts, **vars(config)}
        refuse_changes(config.resume_from, earlier.options, present, in_place)
    return options, config


def default_precision() -> str:
    """What accelerate was told, else fp16, which is TRL's default and right for a GPU; a CPU computes in fp32."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if told is not None and told not in ("no", "fp16", "bf16"):
        raise ValueError(
            f"accelerate's mixed_precision is {told!r} but must be 'no', 'fp16' or 'bf16': change its config, or give "
            "--mixed_precision"
        )
    return told or ("fp16" if torch.cuda.is_available() else "no")


def make_absolute(options: RunArguments, namespace: Any) -> None:
    """Files and folders by their whole paths, so that the run can be resumed from any working directory."""
    for holder, name in ((options, "pretrained_model"), (options, "prompts"), (namespace, "deepspeed")):
        path = existing(getattr(holder, name) or "")
        if path is not None:
            setattr(holder, name, str(path.resolve()))


def function_settings(options: RunArguments) -> dict[str, Any]:
    """What a later run needs to find the reward and the prompts again."""
    specs = {"reward": options.reward, "prompts": options.prompts}
    folders = {name: earlier_run.import_folder(spec) for name, spec in specs.items()}
    return {**specs, "import_folders": {name: folder for name, folder in folders.items() if folder}}


def make_pipeline(options: RunArguments) -> DefaultDDPOStableDiffusionPipeline:
    return DefaultDDPOStableDiffusionPipeline(
        options.pretrained_model,
        pretrained_model_revision=options.pretrained_revision,
        use_lora=not options.full_finetune,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_target_modules=options.target_modules,
    )


def distinct_prompts(prompt_function: PromptFunction, count: int) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Up to `count` different prompts with their metadata, from a few times as many draws."""
    drawn = dict(reversed(list(zip(*draw_prompts(prompt_function, 8 * count), strict=True))))
    chosen = list(reversed(drawn.items()))[:count]
    prompts, metadata = zip(*chosen, strict=True)
    return prompts, metadata
