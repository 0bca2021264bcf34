"""Rewards by name, one or several with weights, and the options of their constructors.

This module does not import torch: the command line lists the names before torch is imported.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddpo_fast.user_functions import load_callable, require_function

# the module of each reward, in this package, and the function in it, or the class whose objects are reward functions
REWARDS = {
    "aesthetic": "aesthetic:AestheticScore",
    "clip_score": "clip_score:ClipScore",
    "hps_v2": "hps_v2:HpsV2",
    "hps_v2.1": "hps_v2:HpsV21",
    "http": "remote:RemoteReward",
    "jpeg_compressibility": "jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "jpeg:jpeg_incompressibility",
    "nsfw": "nsfw:NsfwPenalty",
    "ocr": "ocr:TextShown",
    "pickscore": "pickscore:PickScore",
    "vlm": "vlm:VlmJudge",
}


def load(spec: str, normalize: bool = True, own_process: bool = False, **options: Any) -> Callable[..., Any]:
    """The reward function that `spec` names.

    Args:
        spec: a name in `REWARDS`, 'module:function', or several of these with weights, 'aesthetic:1,my_rewards:red:-2'.
            A weight may be left out where it is 1. With a weight, or several names, it is a `SeveralRewards`.
        normalize: whether `SeveralRewards` are added in units of their spread.
        own_process: whether each reward computes in a process of its own (`OwnProcess`).
        options: arguments of the constructors, given to each class that takes one of this name. A dict has the value of
            each reward by its name.

    Raises `ValueError` for a reward that does not exist, an option that no reward takes, and what constructors raise.
    """
    return load_each([spec], normalize, own_process, **options)[0]


def load_each(
    specs: Sequence[str], normalize: bool = True, own_process: bool = False, **options: Any
) -> list[Callable[..., Any]]:
    """`load` of each of the specs, which share the options; a reward that two of them name is made once."""
    weights = [weights_of(spec) for spec in specs]
    kinds = {name: _kind(name) for each in weights for name in each}
    given = _options_by_name(kinds, options)
    made = {name: _made(name, kind, given[name], own_process) for name, kind in kinds.items()}
    return [_sum_of(each, made, normalize, own_process) for each in weights]


def weights_of(spec: str) -> dict[str, float | None]:
    """The weight of each reward in `spec` by its name; None where there is none.

    Raises `ValueError` for a weight that is not finite or 0, and for a name that comes twice.
    """
    found: dict[str, float | None] = {}
    for part in spec.split(","):
        name, weight = _name_and_weight(part.strip())
        if not name:
            raise ValueError(f"reward is {spec!r:.200}, in which a name is missing: write name:weight,name:weight")
        if weight is not None and (not math.isfinite(weight) or weight == 0):
            raise ValueError(f"reward {name!r} has the weight {weight:g} but needs a finite number that is not 0")
        if name in found:
            raise ValueError(f"reward is {spec!r:.200}, which names {name!r} twice: add their weights")
        found[name] = weight
    return found


def is_local(spec: str) -> bool:
    """Whether all rewards in `spec` are of this package and compute on this machine, without a server.

    Raises `ValueError` for a spec that is wrong.
    """
    names = weights_of(spec)
    return all(name in REWARDS and "url" not in _arguments(_kind(name)) for name in names)


def _name_and_weight(part: str) -> tuple[str, float | None]:
    name, colon, last = part.rpartition(":")
    # 'module:nan' names a function, and float would read a number
    if not colon or (last.isidentifier() and name not in REWARDS):
        return part, None
    try:
        return name.strip(), float(last)
    # 'module:function'
    except ValueError:
        return part, None


def _kind(name: str) -> Callable[..., Any]:
    """The function or class of that name."""
    if name in REWARDS:
        module, _, attribute = REWARDS[name].partition(":")
        return getattr(importlib.import_module(f"ddpo_fast.rewards.{module}"), attribute)
    if ":" not in name:
        raise ValueError(f"reward is {name!r}, which is neither 'module:function' nor one of {', '.join(REWARDS)}")
    return load_callable("reward", name)


def _options_by_name(kinds: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each reward the options that its constructor takes. Raises `ValueError` for one that nobody takes."""
    takes = {name: _arguments(kind) for name, kind in kinds.items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in kinds}
    for option, value in options.items():
        for_all = not isinstance(value, dict)
        takers = [name for name in kinds if option in takes[name]] if for_all else list(value)
        if unknown := [name for name in takers if name not in kinds]:
            raise ValueError(f"{option} is given for reward {unknown[0]!r}, but there are only {', '.join(kinds)}")
        refused = [name for name in takers if option not in takes[name]]
        if refused or not takers:
            names = refused or list(kinds)
            there = "; ".join(f"{name} takes {', '.join(takes[name]) or 'none'}" for name in names)
            # without the value, which may be a password
            raise ValueError(f"there is no reward option {option!r}: {there}")
        for name in takers:
            found[name][option] = value if for_all else value[name]
    return found


def _arguments(kind: Any) -> list[str]:
    """The names of a class's arguments; a function has none to be set."""
    if not inspect.isclass(kind):
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in inspect.signature(kind).parameters.items() if parameter.kind in named]


def _made(name: str, kind: Any, options: dict[str, Any], own_process: bool) -> Any:
    try:
        if inspect.isclass(kind):
            inspect.signature(kind).bind(**options)
    except TypeError as error:
        raise ValueError(f"reward {name!r} cannot be made with its options ({error}): give them as options") from None
    if own_process:
        from ddpo_fast.rewards.own_process import OwnProcess

        return OwnProcess(name, options)
    made = kind(**options) if inspect.isclass(kind) else kind
    require_function(f"reward {name!r}", made)
    return made


def _sum_of(
    weights: Mapping[str, float | None], made: Mapping[str, Any], normalize: bool, own_process: bool
) -> Callable[..., Any]:
    names = list(weights)
    if len(names) == 1 and weights[names[0]] is None:
        return made[names[0]]
    from ddpo_fast.rewards.several import SeveralRewards

    filled = {name: 1.0 if weight is None else weight for name, weight in weights.items()}
    # a user's own function may need the thread that calls the trainer
    in_threads = [name for name in names if name in REWARDS or own_process]
    return SeveralRewards({name: made[name] for name in names}, filled, normalize, in_threads)
