"""What a run's files say of it, checked for its kind: they may come from elsewhere, or from an editor."""

from __future__ import annotations

from typing import Any

KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("epochs", "global_step", "metrics_bytes", "num_processes", "lora_rank"), (int,)),
    **dict.fromkeys(("elapsed_s", "lora_alpha"), (int, float)),
    **dict.fromkeys(("trained", "config", "measured", "files", "import_folders"), (dict,)),
    **dict.fromkeys(("use_lora", "healthy"), (bool,)),
    **dict.fromkeys(("pretrained_model", "pretrained_revision", "reward", "prompts", "base"), (str, type(None))),
    "lora_target_modules": (list,),
}


def problem_with(settings: dict[str, Any]) -> str:
    """The first of a run's settings that is of no kind that a run writes, or ''."""
    for name, kinds in KINDS.items():
        if name in settings and not _is_of(settings[name], kinds):
            return f"{name} is {settings[name]!r:.80}"
    names = [
        *settings.get("lora_target_modules", []),
        *settings.get("files", {}).values(),
        *settings.get("import_folders", {}).values(),
    ]
    return next((f"{name!r:.80} is where a name belongs" for name in names if not isinstance(name, str)), "")


def _is_of(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool) or bool in kinds:
        return isinstance(value, bool) and bool in kinds
    return isinstance(value, kinds) and (not isinstance(value, (int, float)) or value >= 0)
