"""Rules of settings that depend on other packages: which must be installed, and the keywords that accelerate takes."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from dataclasses import fields
from typing import Any

from ddpo_fast.config_rules import TRACKER_PACKAGES, Settings, is_path, plain, shown, whole


def missing_package(config: Settings) -> str:
    """The package that the settings need and that is not installed, in one sentence, or ''."""
    # an optimizer in host memory has 8-bit states of its own
    on_host = config.offload != "none" and not config.uses_deepspeed
    if config.train_use_8bit_adam and not on_host and not _installed("bitsandbytes"):
        return "train_use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`, or set it to False"
    if config.quantize_frozen != "none" and not _installed("bitsandbytes"):
        return "quantize_frozen needs bitsandbytes: `pip install bitsandbytes`, or set it to none"
    if config.uses_deepspeed and not _installed("deepspeed"):
        return "zero and deepspeed need DeepSpeed: `pip install 'deepspeed>=0.19.8'`, or leave them out"
    for tracker in _trackers(config):
        packages = TRACKER_PACKAGES.get(str(tracker), ())
        if tracker == "all":
            packages = tuple(package for packages in TRACKER_PACKAGES.values() for package in packages)
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
    # wandb writes a folder `wandb` into the working directory: that is a namespace package to Python, without an origin
    return found is not None and found.origin is not None


def unknown_keyword(config: Settings) -> str:
    """A sentence about the first keyword that accelerate does not take, or whose value is not allowed, or ''.

    Looks at `tracker_kwargs`, `accelerator_kwargs` and `project_kwargs`.
    """
    if not (config.tracker_kwargs or config.accelerator_kwargs or config.project_kwargs):
        return ""
    # these imports take seconds, and most users give no keywords
    from accelerate import Accelerator
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import ProjectConfiguration

    # the accelerator's arguments that are fields of the config
    ours = {
        "log_with": "log_with",
        "mixed_precision": "mixed_precision",
        "project_config": "project_kwargs",
        "gradient_accumulation_steps": "train_gradient_accumulation_steps",
    }
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
    return _bad_keyword_value(config)


def _bad_keyword_value(config: Settings) -> str:
    """A sentence about the first keyword whose value is not allowed, or ''."""
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
    if limit is not None and not whole(1)(limit):
        return f"project_kwargs['total_limit'] is {shown(limit)} but must be None or a whole number of at least 1"
    for key in ("project_dir", "logging_dir"):
        folder = config.project_kwargs.get(key)
        if folder is not None and not is_path(plain(folder)):
            return f"project_kwargs[{key!r}] is {shown(folder)} but must be the path of a folder"
    return ""
