"""What the settings of a run must be: each field's type and range, and the rules across fields.

A rule names fields, a predicate, and what the value must be, in words for a message.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import numbers
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

# the settings, whose class is made with these rules
Settings: TypeAlias = Any

# sizes beyond are slips of the finger
MOST = 10**6
# no layer of these models is wider
MOST_RANK = 10240


def plain(value: Any) -> Any:
    """NumPy's scalars and paths as Python's own: settings are written to JSON and read again."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") and not value.shape else value


def shown(value: Any) -> str:
    """A value on one line of a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text:.197}..."


def broken_rule(config: Settings) -> str:
    """The first field that breaks its rule, in one sentence, or ''."""
    for names, fits, demand in RULES:
        for name in names.split():
            value = getattr(config, name)
            try:
                fine = bool(fits(value))
            # what compares in ways of its own, as arrays do, or has no length of a number
            except (TypeError, ValueError, ArithmeticError):
                fine = False
            if not fine:
                return f"{name} is {shown(value)} but must be {demand}"
    return ""


def _whole(least: int, most: float = float("inf")) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, numbers.Integral) and not isinstance(v, bool) and least <= int(v) <= most


def _number(fits: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and abs(float(value)) < float("inf")
        and fits(float(value))
    )


def _is_path(value: Any) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        Path(value).expanduser()
    # the home of nobody here
    except RuntimeError:
        return False
    return True


# (fields, predicate, what the value must be); NaN fails every comparison
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("seed", _whole(0, 2**32 - 1), f"a whole number from 0 to {2**32 - 1}, as NumPy's generator takes no larger seed"),
    ("num_epochs", _whole(0, 10**9), f"a whole number from 0 to {10**9}"),
    ("train_warmup_steps train_min_8bit_size", _whole(0), "a whole number of at least 0"),
    ("zero", lambda v: _whole(0)(v) and v <= 3, "0, 1, 2 or 3"),
    ("offload", lambda v: v in ("none", "optimizer", "all"), "'none', 'optimizer' or 'all'"),
    ("train_gradient_dtype", lambda v: v in ("fp32", "half"), "'fp32' or 'half'"),
    ("gradient_checkpointing", lambda v: v in ("none", "selective", "blocks"), "'none', 'selective' or 'blocks'"),
    ("ema_device", lambda v: v in ("auto", "cpu"), "'auto' or 'cpu'"),
    ("ema_decay", _number(lambda v: 0 <= v < 1), "at least 0 and below 1"),
    ("gpu_memory", lambda v: v is None or _number(lambda g: g > 0)(v), "None or a number above 0 (GB)"),
    ("deepspeed", lambda v: v is None or (_is_path(v) and v), "None or the path of a JSON file"),
    ("output_dir", lambda v: v is None or _is_path(v), "None or the path of a folder"),
    ("logdir resume_from", _is_path, "a string, the path of a folder"),
    ("run_name exp_name", _is_path, "a string that can name a folder"),
    ("save_freq num_checkpoint_limit", _whole(1), "a whole number of at least 1"),
    (
        "sample_num_steps sample_batch_size sample_num_batches_per_epoch train_batch_size "
        "train_gradient_accumulation_steps train_num_inner_epochs max_workers per_prompt_stat_tracking_buffer_size "
        "per_prompt_stat_tracking_min_count",
        _whole(1, MOST),
        f"a whole number from 1 to {MOST}",
    ),
    (
        "train_micro_batch_size sample_merge_batches",
        lambda v: v is None or _whole(1, MOST)(v),
        f"None or a whole number from 1 to {MOST}",
    ),
    (
        "allow_tf32 train_use_8bit_adam train_cfg per_prompt_stat_tracking async_reward_computation push_to_hub "
        "train_recompute_log_probs train_skip_dead_pairs sample_cache reward_overlap fuse_unet compile_unet "
        "cuda_graphs train_paged_adam stochastic_rounding optimizer_in_backward vae_slicing vae_tiling offload_frozen "
        "auto_memory",
        lambda v: isinstance(v, bool),
        "True or False",
    ),
    (
        "sample_eta",
        _number(lambda v: 0 < v <= 1),
        "above 0 and at most 1 (at 0 the sampler is deterministic and has no log-probs to train on)",
    ),
    ("train_timestep_fraction", _number(lambda v: 0 < v <= 1), "above 0 and at most 1"),
    ("train_adam_beta1 train_adam_beta2", _number(lambda v: 0 <= v < 1), "at least 0 and below 1"),
    (
        "train_learning_rate train_adam_weight_decay sample_guidance_scale",
        _number(lambda v: v >= 0),
        "a number of at least 0",
    ),
    ("train_adam_epsilon train_adv_clip_max train_clip_range", _number(lambda v: v > 0), "a number above 0"),
    (
        "train_max_grad_norm",
        lambda v: v == float("inf") or _number(lambda norm: norm > 0)(v),
        "a number above 0, or inf to leave gradients as they are",
    ),
    ("mixed_precision", lambda v: v in ("no", "fp16", "bf16", None), "'no', 'fp16' or 'bf16'"),
    (
        "kernel_backend",
        lambda v: v in ("auto", "triton", "csrc", "reference"),
        "'auto', 'triton', 'csrc' or 'reference'",
    ),
    ("attention", lambda v: v in ("auto", "sdpa", "xformers"), "'auto', 'sdpa' or 'xformers'"),
    (
        "log_with",
        lambda v: v is None or not isinstance(v, (str, bool, int, float)) or v in ("wandb", "tensorboard", "all"),
        "None, 'wandb' or 'tensorboard'",
    ),
    ("tracker_project_name", lambda v: isinstance(v, str), "a string"),
    # half of a character that UTF-16 writes as two cannot be encoded
    (
        "negative_prompts",
        lambda v: v is None or (isinstance(v, str) and v.encode() >= b""),
        "a string, or strings that commas then separate",
    ),
)


# settings that do not fit together: when, and what to do
CONFLICTS: tuple[tuple[Callable[[Settings], bool], str], ...] = (
    (
        lambda c: c.zero > 0 and c.deepspeed is not None,
        "zero and deepspeed are both set: the file says which stage it wants, leave out zero",
    ),
    (
        lambda c: c.offload != "none" and (c.deepspeed is not None or c.launched_with_deepspeed),
        "offload and deepspeed are both set: ask for offload_optimizer in the file",
    ),
    (lambda c: c.offload == "all" and c.zero != 3, "offload is 'all', which needs zero=3: use 'optimizer'"),
    (
        lambda c: c.train_paged_adam and not c.train_use_8bit_adam,
        "train_paged_adam is True, which needs train_use_8bit_adam: set that too",
    ),
    (
        lambda c: c.train_paged_adam and (c.offload != "none" or c.uses_deepspeed),
        "train_paged_adam is True, but offload or ZeRO decide where states are: leave it out",
    ),
    (
        lambda c: c.stochastic_rounding and (c.mixed_precision != "bf16" or c.offload != "none" or c.uses_deepspeed),
        "stochastic_rounding is True, which needs mixed_precision='bf16' without offload and ZeRO",
    ),
    (
        lambda c: c.optimizer_in_backward and c.train_max_grad_norm != float("inf"),
        "optimizer_in_backward is True, and a norm is known only after the backward pass: set train_max_grad_norm=inf",
    ),
    (
        lambda c: (
            c.optimizer_in_backward
            and (c.mixed_precision == "fp16" or c.offload != "none" or c.uses_deepspeed or c.cuda_graphs)
        ),
        "optimizer_in_backward is True, which needs mixed_precision 'bf16' or 'no' without offload, ZeRO and "
        "cuda_graphs",
    ),
    (
        lambda c: c.uses_deepspeed and (c.cuda_graphs or c.compile_unet),
        "cuda_graphs and compile_unet cannot look through ZeRO: leave them out",
    ),
)


# what other packages have to say


def missing_package(config: Settings) -> str:
    """The package that the settings need and that is not installed, in one sentence, or ''."""
    on_host = config.offload != "none" and not config.uses_deepspeed
    if config.train_use_8bit_adam and not on_host and not _installed("bitsandbytes"):
        return "train_use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`, or set it to False"
    if config.uses_deepspeed and not _installed("deepspeed"):
        return "zero and deepspeed need DeepSpeed: `pip install 'deepspeed>=0.19.8'`, or leave them out"
    for tracker in _trackers(config):
        packages = {"wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}.get(str(tracker), ())
        if tracker == "all":
            packages = ("wandb", "tensorboard", "tensorboardX")
        if packages and not any(_installed(package) for package in packages):
            return (
                f"log_with is {tracker!r}, which needs {packages[0]}: `pip install {packages[0]}`, or leave it out "
                "(metrics.jsonl has everything)"
            )
    return ""


def _trackers(config: Settings) -> list[Any]:
    given = config.log_with
    return list(given) if isinstance(given, (list, tuple)) else [given] if given is not None else []


def _installed(package: str) -> bool:
    try:
        found = importlib.util.find_spec(package)
    except ValueError:
        return package in sys.modules
    # a folder of that name in the working directory, as wandb makes one, has no origin
    return found is not None and found.origin is not None


def unknown_keyword(config: Settings) -> str:
    """The keyword in one of the `_kwargs` that its receiver does not take, in one sentence, or ''."""
    if not (config.tracker_kwargs or config.accelerator_kwargs or config.project_kwargs):
        return ""
    # seconds, spent by those who give keywords only
    from accelerate import Accelerator
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import ProjectConfiguration

    ours = {"log_with": "log_with", "mixed_precision": "mixed_precision", "project_config": "project_kwargs"}
    ours["gradient_accumulation_steps"] = "train_gradient_accumulation_steps"
    accelerators = list(inspect.signature(Accelerator).parameters)
    trackers = [*LOGGER_TYPE_TO_CLASS, *(tracker.name for tracker in _trackers(config) if hasattr(tracker, "name"))]
    allowed = {
        "tracker_kwargs": list(dict.fromkeys(str(getattr(name, "value", name)) for name in trackers)),
        "accelerator_kwargs": [name for name in accelerators if name not in ours],
        "project_kwargs": [field.name for field in fields(ProjectConfiguration)],
    }
    for option, names in allowed.items():
        for key in getattr(config, option):
            if option == "accelerator_kwargs" and key in ours:
                return f"accelerator_kwargs has {key!r}, which is a setting of its own: use {ours[key]}"
            if key not in names:
                where = "keywords go under the name of a tracker" if option == "tracker_kwargs" else "use one"
                return f"{option} has {shown(key)}: {where} of {', '.join(names)}"
    return _bad_keyword(config)


def _bad_keyword(config: Settings) -> str:
    for name, keywords in config.tracker_kwargs.items():
        if not isinstance(keywords, dict):
            return f"tracker_kwargs[{name!r}] is {shown(keywords)} but must be a dict of that tracker's keywords"
    if config.log_with == "tensorboard" and config.tracker_kwargs.get("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter

        names = [name for name in inspect.signature(SummaryWriter).parameters if name != "log_dir"]
        for key in config.tracker_kwargs["tensorboard"]:
            if key not in names:
                return f"tracker_kwargs['tensorboard'] has {shown(key)}: use one of {', '.join(names)}"
    limit = config.project_kwargs.get("total_limit")
    if limit is not None and not _whole(1)(limit):
        return f"project_kwargs['total_limit'] is {shown(limit)} but must be None or a whole number of at least 1"
    for key in ("project_dir", "logging_dir"):
        folder = config.project_kwargs.get(key)
        if folder is not None and not _is_path(plain(folder)):
            return f"project_kwargs[{key!r}] is {shown(folder)} but must be the path of a folder"
    return ""


def parsed_mapping(name: str, value: Any) -> dict[str, Any]:
    """A dict, also from a JSON object; `ValueError` for anything else."""
    mapping = value
    if isinstance(value, str):
        try:
            mapping = json.loads(value or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is {shown(value)} but must be a JSON object: {error}") from None
    if not isinstance(mapping, (dict, type(None))):
        raise ValueError(f"{name} is {shown(value)} but must be a dict, or a JSON object")
    return mapping or {}
