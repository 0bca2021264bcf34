"""The options of `train` and `sample` that say how rewards are made.

This module does not import torch, as `options.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpo_fast.config import Mapping
from ddpo_fast.config_rules import parsed_mapping
from ddpo_fast.prompts import existing
from ddpo_fast.rewards import REWARDS, load_each, weights_of

REWARD_HELP = f"{', '.join(REWARDS)}, your own module:function, or several with weights: name:weight,name:weight."
_PER_REWARD = "of several rewards name=VALUE,name=VALUE"
# what is recorded in config.json, which people show each other, must not be a password
_SECRET = "api_key"


@dataclass
class RewardArguments:
    """How the rewards are made: arguments of their constructors, and how several are added."""

    reward_model: str = field(
        default="",
        metadata={
            "help": f"Folder or Hub id of the reward's weights, or `bundled` for the scorer of the bundled model's "
            f"images, its default there; {_PER_REWARD}."
        },
    )
    reward_device: str = field(
        default="", metadata={"help": f"Device of the reward's networks, such as cuda:1; {_PER_REWARD}."}
    )
    reward_offload: bool = field(
        default=False, metadata={"help": "Keep the reward's networks in host memory while they are idle."}
    )
    reward_url: str = field(default="", metadata={"help": f"Address of the reward's server; {_PER_REWARD}."})
    reward_options: Mapping = field(
        default_factory=dict,
        metadata={"help": "Other arguments, a JSON object; a value that is an object is for rewards by their names."},
    )
    reward_normalize: bool = field(
        default=True, metadata={"help": "Add several rewards in units of their spread so far, not as they are."}
    )
    reward_process: bool = field(
        default=False, metadata={"help": "Compute each reward in a process of its own, which may crash alone."}
    )

    def __post_init__(self) -> None:
        self.reward_options = parsed_mapping("reward_options", self.reward_options)
        if _SECRET in self.reward_options:
            raise ValueError(
                f"reward_options has {_SECRET}, which would be recorded in the run's config.json: set it in the "
                "environment"
            )

    def constructor_options(self, names: Collection[str]) -> dict[str, Any]:
        """The arguments for constructors of the rewards `names`, as `rewards.load` takes them.

        Raises `ValueError` for one that is given twice.
        """
        texts = {"model": self.reward_model, "device": self.reward_device, "url": self.reward_url}
        found: dict[str, Any] = {name: by_reward(text, names) for name, text in texts.items() if text}
        if self.reward_offload:
            found["offload"] = True
        if twice := found.keys() & self.reward_options.keys():
            raise ValueError(f"reward_options has {min(twice)!r}, which --reward_{min(twice)} gives too: leave out one")
        return {**found, **self.reward_options}

    def load(self, *specs: str) -> list[Callable[..., Any]]:
        """The reward functions of the specs. Raises what `rewards.load` raises."""
        names = [name for spec in specs for name in weights_of(spec)]
        return load_each(specs, self.reward_normalize, self.reward_process, **self.constructor_options(names))


def by_reward(text: str, names: Collection[str]) -> str | dict[str, str]:
    """The value of each reward by its name, of 'name=VALUE,name=VALUE'; `text` itself if it does not begin so."""
    starts = list(re.finditer(rf"(?:^|,)({'|'.join(map(re.escape, names))})=", text))
    if not starts or starts[0].start() > 0:
        return text
    ends = [start.start() for start in starts[1:]] + [len(text)]
    return {start[1]: text[start.end() : end] for start, end in zip(starts, ends, strict=True)}


def with_absolute_models(text: str, names: Collection[str]) -> str:
    """`reward_model` with the paths of what exists made absolute, so that a run can be resumed from anywhere."""
    given = by_reward(text, names)
    if isinstance(given, str):
        return _absolute(given)
    return ",".join(f"{name}={_absolute(value)}" for name, value in given.items())


def _absolute(text: str) -> str:
    path = existing(text)
    return text if path is None else str(Path(path).resolve())
