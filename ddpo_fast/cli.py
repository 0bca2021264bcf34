"""The command line: `ddpo-fast train`, `ddpo-fast plan`, `ddpo-fast sample` and `ddpo-fast info`."""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from ddpo_fast import checkpoint, ops, plan_command, report, rewards
from ddpo_fast.attention import attention_problem, chosen_kernels, described
from ddpo_fast.config import DDPOConfig
from ddpo_fast.health import RunStopped
from ddpo_fast.hub import push_problem
from ddpo_fast.model_configs import check_model
from ddpo_fast.pipeline import DefaultDDPOStableDiffusionPipeline
from ddpo_fast.processes import the_main_one
from ddpo_fast.prompts import PROMPT_LISTS, PromptFunction, draw_prompts, load_prompts
from ddpo_fast.resumption import refuse_changes
from ddpo_fast.rules import MOST_RANK
from ddpo_fast.run_log import folder_problem
from ddpo_fast.trainer import DDPOTrainer
from ddpo_fast.version import __version__
from ddpo_fast.zero_settings import zero_settings

BEFORE = "before.pt"
SHOWN_PROMPTS = 8
# of Stable Diffusion 1.x; 2.x and XL have 64
SD_HEAD_DIMS = (40, 80, 160, 64)
TRL_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


@dataclass
class PlanArguments:
    """Where it is to run."""

    num_processes: int = field(default=1, metadata={"help": "Processes, each with a GPU of its own."})


@dataclass
class RunArguments:
    """What to train, on what, towards what."""

    pretrained_model: str = field(
        default="", metadata={"help": "Folder or Hub id of a Stable Diffusion (default: the bundled tiny model)."}
    )
    pretrained_revision: str = field(default="main", metadata={"help": "Revision of the model on the Hub."})
    full_finetune: bool = field(default=False, metadata={"help": "Train all weights of the UNet instead of a LoRA."})
    lora_rank: int = field(default=4, metadata={"help": "Rank of the LoRA adapter."})
    lora_alpha: int = field(default=4, metadata={"help": "Scale of the LoRA adapter, divided by its rank."})
    lora_target_modules: str = field(
        default=",".join(TRL_TARGETS), metadata={"help": "Names of the adapted layers, separated by commas."}
    )
    reward: str = field(
        default="jpeg_compressibility",
        metadata={"help": f"{', '.join(rewards.REWARDS)}, or your own function as module:function."},
    )
    prompts: str = field(
        default="simple_animals",
        metadata={"help": f"{', '.join(PROMPT_LISTS)}, a text file with a prompt a line, or module:function."},
    )

    def __post_init__(self) -> None:
        for name in ("lora_rank", "lora_alpha"):
            if not 1 <= getattr(self, name) <= MOST_RANK:
                raise ValueError(f"{name} is {getattr(self, name)} but must be a whole number from 1 to {MOST_RANK}")

    @property
    def target_modules(self) -> list[str]:
        return [name.strip() for name in self.lora_target_modules.split(",") if name.strip()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; a user's mistake ends it with one sentence and a failing exit status."""
    parser = argparse.ArgumentParser(
        prog="ddpo-fast", description="Fine-tune Stable Diffusion with reinforcement learning."
    )
    commands = {"train": train, "plan": plan, "sample": sample, "info": info}
    parser.add_argument("command", choices=list(commands), help="`ddpo-fast COMMAND --help` lists its options")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = parser.parse_args(arguments[:1]).command
    try:
        commands[command](arguments[1:])
    except (ValueError, OSError, ImportError, RunStopped) as error:
        sys.exit(f"ddpo-fast {command}: error: {error}")
    except KeyboardInterrupt:
        # what is left to do after it, the trainer has said
        sys.exit(128 + signal.SIGINT)


def make_pipeline(run: RunArguments) -> DefaultDDPOStableDiffusionPipeline:
    return DefaultDDPOStableDiffusionPipeline(
        run.pretrained_model,
        pretrained_model_revision=run.pretrained_revision,
        use_lora=not run.full_finetune,
        lora_rank=run.lora_rank,
        lora_alpha=run.lora_alpha,
        lora_target_modules=run.target_modules,
    )


# train


def train(arguments: Sequence[str]) -> None:
    """Trains as the options say, and leaves reports and the final model in the output folder."""
    run, config = parse_train_options(arguments)
    reward_function, prompt_function = rewards.load_reward(run.reward), load_prompts(run.prompts)
    random.seed(config.seed)
    shown = distinct_prompts(prompt_function, SHOWN_PROMPTS)
    check_before_loading(run, config, reward_function, shown)
    if config.auto_memory:
        plan_command.apply_auto_memory(run, config, "cuda" if torch.cuda.is_available() else "cpu")
    pipeline = make_pipeline(run)
    trainer = DDPOTrainer(config, reward_function, prompt_function, pipeline)
    trainer.run_settings.update(reward=run.reward, prompts=run.prompts)
    trainer.run_log.write_config(trainer.run_settings)
    say = print if trainer.accelerator.is_main_process else lambda *_: None
    say(config.batch_arithmetic(trainer.accelerator.num_processes))
    say(f"writing to {trainer.output_dir}")
    before = images_before(trainer, *shown)
    trainer.train()
    after = trainer.evaluate(*shown)
    if trainer.accelerator.is_main_process:
        rows = [("before", *before), ("after", *after)]
        path = trainer.output_dir / "before_after.png"
        report.draw_before_after(shown[0], [(name, images, scores.tolist()) for name, images, scores in rows], path)
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub()
    say(f"reward of the shown images: {before[1].mean():.3f} before, {after[1].mean():.3f} after")
    say(f"see before_after.png and rewards.png in {trainer.output_dir}; the model is in {trainer.output_dir / 'final'}")
    trainer.accelerator.end_training()


def parse_train_options(arguments: Sequence[str]) -> tuple[RunArguments, DDPOConfig]:
    """The options, with the settings of the run that `--resume_from` names as defaults."""
    parser = HfArgumentParser(
        [RunArguments, DDPOConfig],  # type: ignore[list-item]
        prog="ddpo-fast train",
        description="Fine-tune Stable Diffusion on a reward with DDPO (arXiv 2305.13301).",
        allow_abbrev=False,
    )
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--resume_from", "--resume-from", default="")
    resume_from = early.parse_known_args(arguments)[0].resume_from
    # the `deepspeed` launcher tells a process its number in the environment, and here too
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--local_rank", "--local-rank")
    _, arguments = launcher.parse_known_args(arguments)
    # fp16 is TRL's default and right for a GPU; a CPU computes in fp32
    parser.set_defaults(mixed_precision="fp16" if torch.cuda.is_available() else "no")
    saved = saved_options(resume_from) if resume_from else {}
    parser.set_defaults(**saved)
    run, config = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    if saved.get("full_finetune", run.full_finetune) != run.full_finetune:
        kind = "all weights" if saved["full_finetune"] else "a LoRA adapter"
        raise ValueError(f"resume_from is {resume_from!r}, a run that trained {kind}: leave out --full-finetune")
    if not config.output_dir:
        name = f"{run.reward.replace(':', '.')}-{datetime.now():%Y%m%d-%H%M%S}"
        config.output_dir = str(checkpoint.run_folder(resume_from) if resume_from else Path("runs") / name)
    return run, config


def saved_options(resume_from: str) -> dict[str, Any]:
    """The options that a run was started with, by name."""
    settings = saved_settings(resume_from)
    known = {f.name for f in fields(RunArguments)} | {f.name for f in fields(DDPOConfig)}
    options = {**settings["config"], **settings}
    options["full_finetune"] = not settings.get("use_lora", True)
    options["lora_target_modules"] = ",".join(settings.get("lora_target_modules", TRL_TARGETS))
    return {name: options[name] for name in known - {"resume_from", "output_dir"} if name in options}


def saved_settings(resume_from: str) -> dict[str, Any]:
    """What the run that `resume_from` names has recorded of itself."""
    found = checkpoint.find(resume_from)
    if found is not None:
        return checkpoint.read_state(found)
    return json.loads((checkpoint.run_folder(resume_from) / "config.json").read_text(encoding="utf-8"))


def check_before_loading(
    run: RunArguments, config: DDPOConfig, reward_function: rewards.RewardFunction, shown: tuple[Any, Any]
) -> None:
    """What can be found wrong without the model, found now; the reward function scores two gray images."""
    check_model(run.pretrained_model, run.pretrained_revision, config.sample_num_steps, config.sample_eta)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops.require_backend(config.kernel_backend, device)
    if config.attention == "xformers" and (problem := attention_problem("xformers", (), device)):
        raise ValueError(f"attention is 'xformers', which cannot run: {problem}")
    if config.uses_deepspeed:
        zero_settings(config, config.mixed_precision)
    folder = Path(config.output_dir or "").expanduser()
    if config.resume_from:
        present = {"reward": run.reward, "prompts": run.prompts, **vars(config)}
        in_place = checkpoint.goes_on_in(folder, config.resume_from)
        refuse_changes(config.resume_from, saved_settings(config.resume_from), present, in_place)
    if not checkpoint.goes_on_in(folder, config.resume_from) and (problem := folder_problem(folder)):
        raise ValueError(problem)
    if config.push_to_hub and (problem := push_problem(folder.absolute().name)):
        raise ValueError(f"push_to_hub is True, but {problem}")
    prompts, metadata = (part[:2] * (3 - len(part[:2])) for part in shown)
    try:
        rewards.score(reward_function, torch.full((2, 3, 64, 64), 0.5), prompts[:2], metadata[:2])
    except RuntimeError as error:
        raise ValueError(f"{error} (when it was tried on two gray images)") from error


def distinct_prompts(prompt_function: PromptFunction, count: int) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Up to `count` different prompts with their metadata, from a few times as many draws."""
    drawn = dict(reversed(list(zip(*draw_prompts(prompt_function, 8 * count), strict=True))))
    chosen = list(reversed(drawn.items()))[:count]
    prompts, metadata = zip(*chosen, strict=True)
    return prompts, metadata


def images_before(
    trainer: DDPOTrainer, prompts: tuple[str, ...], metadata: tuple[Any, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The base model's images of the shown prompts; a resumed run has them from its start."""
    path = trainer.output_dir / BEFORE
    earlier = checkpoint.run_folder(trainer.config.resume_from) if trainer.config.resume_from else trainer.output_dir
    found = None
    for kept_path in (path, earlier / BEFORE):
        kept = torch.load(kept_path, weights_only=True) if kept_path.exists() else {"prompts": []}
        if found is None and tuple(kept["prompts"]) == prompts:
            found = kept["images"], kept["rewards"]
    # all draw, or none: their prompts may differ
    if (found := the_main_one(trainer.accelerator, found)) is not None:
        return found
    images, scores = trainer.evaluate(prompts, metadata)
    if trainer.accelerator.is_main_process:
        aside = path.with_suffix(".partial")
        torch.save({"prompts": list(prompts), "images": images, "rewards": scores}, aside)
        aside.replace(path)
    return images, scores


# plan


def plan(arguments: Sequence[str]) -> None:
    """Prints the memory that training takes and the fastest settings for a GPU, without loading the model."""
    parser = HfArgumentParser(
        [RunArguments, DDPOConfig, PlanArguments],  # type: ignore[list-item]
        prog="ddpo-fast plan",
        description="Predict the memory of `ddpo-fast train` with the same options, and choose what fits --gpu-memory.",
        allow_abbrev=False,
    )
    parser.set_defaults(mixed_precision="fp16")
    run, config, where = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    plan_command.show(run, config, arguments, where.num_processes)


# sample


def sample(arguments: Sequence[str]) -> None:
    """Draws a trained run's images below the base model's, from the same noise."""
    parser = argparse.ArgumentParser(
        prog="ddpo-fast sample",
        description="Draw a grid: the base model above, the trained one below, from the same noise.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", help="output folder of a run, or a checkpoint in it")
    parser.add_argument("--prompts", help="a named list, a text file or module:function (default: the run's)")
    parser.add_argument("--num-images", type=int, default=8, help="images in each row")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of the choice of prompts")
    parser.add_argument("--output", type=Path, help="where the grid goes (default: samples.png in the run's folder)")
    options = parser.parse_args(arguments)
    found = checkpoint.find(options.run)
    if found is None:
        raise ValueError(f"{options.run!r} has no checkpoint yet: train it for at least save_freq epochs")
    saved = saved_options(str(found))
    random.seed(options.seed)
    run = RunArguments(**{f.name: saved[f.name] for f in fields(RunArguments) if f.name in saved})
    prompts, _ = draw_prompts(load_prompts(options.prompts or run.prompts), options.num_images)
    pipeline = make_pipeline(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline.sd_pipeline.to(device)

    def draw() -> torch.Tensor:
        return pipeline(
            prompt=list(prompts),
            num_inference_steps=saved["sample_num_steps"],
            guidance_scale=saved["sample_guidance_scale"],
            eta=saved["sample_eta"],
            generator=torch.Generator().manual_seed(options.seed),
            output_type="pt",
        ).images.float()

    base = draw()
    model = pipeline.get_trainable_layers()
    pipeline.load_checkpoint([model], str(found))
    path = options.output or checkpoint.run_folder(found) / "samples.png"
    report.draw_before_after(prompts, [("base", base, None), ("trained", draw(), None)], path)
    print(f"drew {path}")


# info


def info(arguments: Sequence[str]) -> None:
    """Prints what runs on this machine, and why the rest does not."""
    argparse.ArgumentParser(
        prog="ddpo-fast info", description="Print which kernels run on this machine, and why the others do not."
    ).parse_args(list(arguments))
    versions = [f"{name} {version}" for name, version in installed(("torch", "triton", "diffusers", "xformers"))]
    print(f"ddpo_fast {__version__}, {', '.join(versions)}")
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        print(f"\n{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}")
        for op, running, reasons in ops.status(device):
            print(f"  {op:<26}{running}")
            for backend, reason in reasons.items():
                print(f"  {'':<26}not {backend}: {reason}")
        kernels, problems = chosen_kernels(SD_HEAD_DIMS, torch.device(device), torch.float16)
        print(f"  {'attention':<26}{described(kernels)}")
        for name, problem in problems.items():
            print(f"  {'':<26}not {name}: {problem}")


def installed(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and versions; 'not installed' where it is."""
    for name in names:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"


if __name__ == "__main__":
    main()
