"""Checks the types in state.json and config.json, as these files may be from another machine or edited by hand."""

from __future__ import annotations

from typing import Any

# the types that a run writes, by name
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("epochs", "global_step", "metrics_bytes", "num_processes", "lora_rank"), (int,)),
    **dict.fromkeys(("elapsed_s", "lora_alpha"), (int, float)),
    **dict.fromkeys(("trained", "config", "measured", "files", "import_folders", "first_spreads"), (dict,)),
    **dict.fromkeys(("use_lora", "healthy"), (bool,)),
    **dict.fromkeys(("pretrained_model", "pretrained_revision", "base"), (str, type(None))),
    **dict.fromkeys(("recipe", "reward", "prompts", "eval_reward", "eval_prompts"), (str, type(None))),
    **dict.fromkeys(("sample_prompts",), (str, type(None))),
    **dict.fromkeys(("reward_model", "reward_device", "reward_url", "single_file_config"), (str,)),
    **dict.fromkeys(("reward_offload", "reward_normalize", "reward_process"), (bool,)),
    "reward_options": (dict,),
    "lora_target_modules": (list,),
    "scores": (list,),
}


def problem_with(settings: dict[str, Any]) -> str:
    """The first of the settings that has another type than a run writes, or ''."""
    for name, types in TYPES.items():
        if name in settings and not _has_type(settings[name], types):
            return f"{name} is {settings[name]!r:.80}"
    for spreads in settings.get("first_spreads", {}).values():
        if not isinstance(spreads, list) or not all(_has_type(spread, (int, float)) for spread in spreads):
            return f"first_spreads has {spreads!r:.80}"
    names = [
        *settings.get("lora_target_modules", []),
        *settings.get("files", {}).values(),
        *settings.get("import_folders", {}).values(),
    ]
    return next((f"{name!r:.80} is where a name belongs" for name in names if not isinstance(name, str)), "")


def _has_type(value: Any, types: tuple[type, ...]) -> bool:
    """Whether `value` is of one of the types, where a bool is no int, and not negative if it is a number."""
    if isinstance(value, bool) or bool in types:
        return isinstance(value, bool) and bool in types
    return isinstance(value, types) and (not isinstance(value, (int, float)) or value >= 0)
