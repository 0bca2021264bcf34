"""`ddpo-fast train`: options, checks that need no weights, training, and what the run leaves in its folder."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ddpo_fast import recipes
from ddpo_fast.commands import before_after, plan, recorded_run, settings_file
from ddpo_fast.commands.early_checks import check_before_loading, device_of, try_reward
from ddpo_fast.commands.options import (
    RunArguments,
    apply_bundled_scorer,
    apply_recipe,
    check_no_lora_options,
    from_options,
    given_options,
    precision_or_default,
    train_parser,
)
from ddpo_fast.commands.reward_options import RewardArguments, with_absolute_models
from ddpo_fast.config import DDPOConfig
from ddpo_fast.cpu_speed import bf16_speedup
from ddpo_fast.evaluation import distinct_prompts
from ddpo_fast.families import with_family
from ddpo_fast.pipeline import DefaultDDPOStableDiffusionPipeline
from ddpo_fast.prompts import absolute, existing, load_prompts
from ddpo_fast.rewards import SeveralRewards, weights_of
from ddpo_fast.run_folder import checkpoint, pictures
from ddpo_fast.run_folder.resume_checks import refuse_changes
from ddpo_fast.run_folder.run_log import default_folder, output_folder
from ddpo_fast.trainer import DDPOTrainer

# prompts whose images are compared before and after training
EXAMPLE_PROMPTS = 8
# bf16 is suggested where it is this many times as fast as fp32
WORTH_BF16 = 1.25


def run(arguments: Sequence[str], dry_run: bool = False) -> None:
    """Trains as the options say, and leaves reports and the final model in the output folder.

    With `dry_run` it stops before the weights are loaded, when all else has been checked, and writes nothing.
    """
    # In one piece, as each stage needs those before it: options, checks, plan, trainer, training, reports.
    options, config = read_options(arguments)
    token = train_parser().parse(arguments).hf_user_access_token
    # Importing the user's module may change the working directory, so that folders are made absolute first.
    for name in ("output_dir", "logdir"):
        if folder := getattr(config, name):
            setattr(config, name, str(Path(folder).expanduser().absolute()))

    # Everything that can be found wrong without the model's weights: folders, backends, the model's config files, the
    # user's functions. The examples are drawn from the run's seed, so that a resumed run compares the same prompts.
    configs = check_before_loading(options, config, token)
    reward_function, *eval_rewards = options.load(*options.reward_specs)
    prompt_function = load_prompts(options.prompts)
    # None: the trainer evaluates by the prompts of training
    eval_prompts = load_prompts(options.eval_prompts) if options.eval_prompts else None
    sample_prompts = load_prompts(options.sample_prompts) if options.sample_prompts else None
    random.seed(config.seed)
    examples = distinct_prompts(prompt_function, EXAMPLE_PROMPTS)
    for function, wanted in itertools.product((reward_function, *eval_rewards), config.image_sizes):
        try_reward(function, examples, configs.family.image_size_of(configs.parts, *wanted), device_of(config))

    given = given_options(arguments)
    for line in recipe_lines(options, config, given):
        plan.print_on_main(line)
    if hint := precision_hint(config, given, device_of(config).type):
        plan.print_on_main(hint)
    # Settings chosen by the predicted memory have to be in the config before the trainer reads it.
    if config.auto_memory:
        plan.apply_auto_memory(options, config, device_of(config))
    if dry_run:
        config = with_family(config, configs.family)
        for line in (config.batch_arithmetic(plan.num_processes()), *plan.prediction(options, config)):
            plan.print_on_main(line)
        return

    # The weights are loaded here. config.json also records where the functions came from, for `--resume_from`.
    trainer = DDPOTrainer(
        config,
        reward_function,
        prompt_function,
        make_pipeline(options),
        eval_reward_function=SeveralRewards.of(eval_rewards[0], options.eval_reward) if eval_rewards else None,
        eval_prompt_function=eval_prompts,
        sample_prompt_function=sample_prompts,
    )
    trainer.run_settings.update(command_settings(options))
    trainer.run_log.write_config(trainer.run_settings)
    trainer.run_log.write_text("config.yaml", settings_file.of_run(train_parser(), {**vars(options), **vars(config)}))

    def say(line: str) -> None:
        if trainer.accelerator.is_main_process:
            print(line, flush=True)

    say(trainer.policy.config.batch_arithmetic(trainer.accelerator.num_processes))
    say(f"writing to {trainer.output_dir}")

    before = before_after.find_or_draw(trainer, *examples)
    trainer.train()

    with trainer.finishing():
        if config.export == "best" and (best := trainer.load_best_checkpoint()) is not None:
            say(f"final has the weights after epoch {best}, which had the best {trainer.progress.scores.kind}")
        # The model is saved first: evaluating may fail in the user's reward, or be interrupted.
        trainer.save_model()
        images, scores = trainer.evaluate(*examples)
        drawn = trainer.accelerator.is_main_process and pictures.attempt(
            before.draw, trainer.output_dir, examples[0], images, scores
        )
        # again, now that there are images from after training
        trainer.write_report()

    say(f"reward of the shown images: {before.rewards.mean():.3f} {before.label}, {scores.mean():.3f} after")
    where = f"see report.html, {drawn.name} and rewards.png in {trainer.output_dir}; " if drawn else ""
    say(f"{where}the model is in {trainer.output_dir / 'final'}")
    if config.push_to_hub:
        say(f"pushed to {trainer.push_to_hub(token=token)}")
    trainer.accelerator.end_training()


def read_options(arguments: Sequence[str]) -> tuple[RunArguments, DDPOConfig]:
    """The options, with the settings of a recipe as defaults, or those of the run that `--resume_from` names.

    Raises `ValueError` for options that are wrong, that contradict each other, or that the resumed run cannot go on
    with.
    """
    # Options are parsed twice: first to learn which run is resumed, then with that run's settings as defaults.
    parser, given = train_parser(), given_options(arguments)
    first = parser.parse(arguments)
    resumed = recorded_run.read(first.resume_from) if first.resume_from else None
    if resumed is not None:
        if "reward" in given and first.reward != resumed.options.get("reward"):
            resumed.forget_how_rewards_are_made()
        resumed.check_trust(given, first.trust_run)
        parser.set_defaults(**resumed.options)
    namespace = parser.parse(arguments)
    namespace.mixed_precision = precision_or_default(namespace.mixed_precision, torch.cuda.is_available())
    apply_bundled_scorer(namespace)
    if resumed is None:
        apply_recipe(namespace, given)

    options = from_options(RunArguments, namespace)
    if resumed is not None:
        recorded_run.check_trains_same_part(resumed, given, options)
    check_no_lora_options(given, options.full_finetune)
    make_absolute(options, namespace)
    if resumed is not None:
        recorded_run.check_same_recipe(resumed, given, options)

    config = from_options(DDPOConfig, namespace)
    if "exp_name" not in given:
        # `exp_name` begins the default folder's name: with the reward's name, it says what the model is trained for
        config.exp_name = "+".join(weights_of(options.reward)).replace(":", ".")
    if resumed is not None:
        # With an option that names a folder, a new run there starts from the resumed one. Else the resumed run is
        # continued in its own folder.
        if given & {"logdir", "run_name", "exp_name"} and not config.output_dir:
            config.output_dir = str(default_folder(config))
        in_place = checkpoint.continues_in(output_folder(config), config.resume_from)
        names = ("reward", "reward_model", "reward_normalize", "prompts")
        present = {**{name: getattr(options, name) for name in names}, **vars(config)}
        refuse_changes(config.resume_from, resumed.options, present, in_place)
    return options, config


def make_absolute(options: RunArguments, namespace: Any) -> None:
    """Makes the paths of files and folders absolute, so that the run can be resumed from any working directory."""
    options.reward_model = with_absolute_models(options.reward_model, options.reward_names)
    for name in ("prompts", "eval_prompts", "sample_prompts"):
        setattr(options, name, absolute(getattr(options, name)))
    paths = [(options, "pretrained_model"), (options, "single_file_config"), (namespace, "deepspeed")]
    # a file may have the name of a recipe
    if options.recipe not in recipes.names():
        paths.append((options, "recipe"))
    for holder, name in paths:
        path = existing(getattr(holder, name) or "")
        if path is not None:
            # a file in the Hub's cache is a link to one without an ending
            setattr(holder, name, str(path.resolve() if path.is_dir() else path.absolute()))


def precision_hint(config: DDPOConfig, given: set[str], device_type: str) -> str:
    """A suggestion to train in bf16: for a new run in fp32 by default, on a processor that is faster in bf16."""
    if device_type != "cpu" or config.mixed_precision != "no" or config.resume_from or "mixed_precision" in given:
        return ""
    speedup = bf16_speedup()
    if speedup < WORTH_BF16:
        return ""
    return f"training in fp32; with --mixed_precision bf16 this processor computes layers {speedup:.1f} times as fast"


def recipe_lines(options: RunArguments, config: DDPOConfig, given: set[str]) -> list[str]:
    """What is printed about the recipe at the start of a run."""
    if not config.resume_from:
        return recipes.load(options.recipe).describe({**vars(options), **vars(config)}, given)
    return [f"recipe {options.recipe}, with the settings that the resumed run recorded"] if options.recipe else []


def command_settings(options: RunArguments) -> dict[str, Any]:
    """The names of recipe, rewards and prompts, how the rewards were made, and where functions were imported from."""
    specs = {
        "reward": list(weights_of(options.reward)),
        "prompts": [options.prompts],
        "eval_reward": list(weights_of(options.eval_reward)) if options.eval_reward else [],
        "eval_prompts": [options.eval_prompts],
        "sample_prompts": [options.sample_prompts],
    }
    folders = {name: recorded_run.import_folders(*each) for name, each in specs.items()}
    made = {option.name: getattr(options, option.name) for option in fields(RewardArguments)}
    return {
        "recipe": options.recipe,
        **{name: getattr(options, name) for name in specs},
        **made,
        "import_folders": {name: folder for name, folder in folders.items() if folder},
    }


def make_pipeline(options: RunArguments) -> DefaultDDPOStableDiffusionPipeline:
    return DefaultDDPOStableDiffusionPipeline(
        options.pretrained_model,
        pretrained_model_revision=options.pretrained_revision,
        single_file_config=options.single_file_config,
        use_lora=not options.full_finetune,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_target_modules=options.target_modules,
    )
