"""The groups in which `--help` and `ddpo-fast init` show the options of `train` and `plan`, the usual ones first.

An option is in the group that names it, else in the one whose prefix it has. This module does not import torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple


class Group(NamedTuple):
    """Options that belong together.

    Args:
        title: of the group.
        usual: names of the options that most users set.
        names: names of the others.
        prefixes: of further options.
    """

    title: str
    usual: tuple[str, ...]
    names: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()


GROUPS = (
    Group(
        "model and task",
        ("pretrained_model", "full_finetune", "lora_rank", "reward", "prompts", "num_epochs", "recipe", "seed"),
        ("pretrained_revision", "single_file_config"),
        ("lora_",),
    ),
    Group("rewards", ("reward_model", "eval_reward"), (), ("reward_", "eval_", "async_", "max_workers")),
    Group(
        "sampling",
        (
            "sample_num_steps",
            "sample_guidance_scale",
            "sample_batch_size",
            "sample_num_batches_per_epoch",
            "sample_group_size",
            "negative_prompts",
        ),
        ("sampler", "sde_window", "height", "width", "sizes", "ema_sampling"),
        ("sample_",),
    ),
    Group(
        "training",
        ("train_learning_rate", "train_batch_size", "train_gradient_accumulation_steps", "mixed_precision"),
        ("objective", "step_credit", "spatial_credit", "ema_decay"),
        ("train_", "per_prompt_", "rwr_"),
    ),
    Group(
        "memory",
        ("auto_memory", "gpu_memory", "train_micro_batch_size", "gradient_checkpointing", "train_use_8bit_adam"),
        (
            "host_memory",
            "train_paged_adam",
            "train_min_8bit_size",
            "train_gradient_dtype",
            "stochastic_rounding",
            "optimizer_in_backward",
            "ema_device",
        ),
        ("offload", "vae_", "quantize_", "embed_"),
    ),
    Group(
        "speed and processes",
        (),
        (
            "attention",
            "fuse_unet",
            "compile_unet",
            "cuda_graphs",
            "kernel_backend",
            "allow_tf32",
            "sample_cache",
            "sample_merge_batches",
            "reward_overlap",
            "train_skip_dead_pairs",
            "num_processes",
            "accelerator_kwargs",
        ),
        ("zero", "deepspeed"),
    ),
    Group(
        "run and logging",
        ("output_dir", "resume_from", "log_with", "save_freq", "sample_freq", "export", "push_to_hub"),
        (
            "trust_run",
            "dry_run",
            "sample_num_images",
            "sample_prompts",
            "kohya_lora",
            "hf_user_access_token",
            "exp_name",
            "run_name",
            "logdir",
            "num_checkpoint_limit",
            "keep_best_checkpoint",
            "keep_checkpoint_every",
            "early_stopping_patience",
            "project_kwargs",
        ),
        ("tracker_", "hub_"),
    ),
)


def group_of(name: str) -> Group:
    """The group of an option. Raises `LookupError` for one that is in none: add it to `GROUPS`."""
    named = [group for group in GROUPS if name in (*group.usual, *group.names)]
    prefixed = [group for group in GROUPS if name.startswith(group.prefixes or ("\n",))]
    for group in (*named, *prefixed):
        return group
    raise LookupError(f"{name} is in no group of options")


def grouped(names: Sequence[str]) -> list[tuple[Group, list[str]]]:
    """Each group with those of the options that are in it, the usual ones first; without empty groups."""
    found: dict[str, list[str]] = {group.title: [] for group in GROUPS}
    for name in names:
        found[group_of(name).title].append(name)
    order = {name: place for group in GROUPS for place, name in enumerate(group.usual)}
    return [(g, sorted(found[g.title], key=lambda n: order.get(n, len(order)))) for g in GROUPS if found[g.title]]


class _Formatter(argparse.HelpFormatter):
    """Shows an option in one spelling, and its default where that says something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # of a switch only what it may be given is of interest, and True is what it means without
        values = self._format_args(action, action.dest.upper()) if action.nargs != "?" else ""
        return f"{action.option_strings[0]} {values}".strip()

    def _get_help_string(self, action: argparse.Action) -> str:
        text = str(action.help)
        says_nothing = action.default in (None, "", argparse.SUPPRESS) or action.default == {}
        return text if says_nothing or "(default" in text else f"{text} (default: %(default)s)"


def grouped_help(parser: argparse.ArgumentParser, everything: bool) -> str:
    """A parser's help by groups: of the usual options, or of all."""
    # reversed, as --no_NAME comes after --NAME
    actions = {a.dest: a for a in reversed(parser._actions) if a.help != argparse.SUPPRESS}
    own = [actions.pop(name) for name in list(actions) if name.startswith("help")]
    formatter = _Formatter(prog=parser.prog)
    formatter.add_text(f"usage: {parser.prog} [FILE.yaml] [--option value ...]")
    formatter.add_text(parser.description)
    for group, names in grouped(list(actions)):
        shown = names if everything else [name for name in names if name in group.usual]
        if shown:
            formatter.start_section(group.title)
            formatter.add_arguments(actions[name] for name in shown)
            formatter.end_section()
    formatter.start_section("help")
    formatter.add_arguments(own)
    formatter.end_section()
    formatter.add_text(parser.epilog)
    return formatter.format_help()
