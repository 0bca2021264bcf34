"""The options of an earlier run, read from its folder: data that somebody else may have written.

A run's files may name functions to import and settings of other programs. Those are used only where the user asks for
them: by `--trust_run`, or by giving the option again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ddpo_fast.commands.options import BUILT_IN_REWARDS, LORA_OPTIONS, TRL_TARGETS, RunArguments
from ddpo_fast.config import DDPOConfig
from ddpo_fast.prompts import existing
from ddpo_fast.run_folder import checkpoint, recorded_settings

FUNCTIONS = ("reward", "prompts")
# settings of other programs, which can name files and addresses, and what leaves this machine
OF_OTHERS = ("accelerator_kwargs", "project_kwargs", "tracker_kwargs", "deepspeed", "push_to_hub")
# where a run writes is said on the command line, or is the run's own folder
PLACES = ("resume_from", "output_dir", "logdir", "run_name", "exp_name")


@dataclass
class EarlierRun:
    """What `state.json` or `config.json` says."""

    named: str
    folder: Path
    options: dict[str, Any]
    # of 'reward' and 'prompts': the folder that the function's module was imported from
    import_folders: dict[str, str]

    def check_trust(self, given: Collection[str], trusts: bool, used: Collection[str] | None = None) -> None:
        """Raises `ValueError` for what only a trusted run may do, unless it is trusted or the option is given again.

        Args:
            given: the options on the command line.
            used: the options that matter; all if None.
        """
        if trusts:
            self._find_modules(given)
            return
        asked = [
            f"{name}={value!r}{self._whence(name)}"
            for name, value in self._of_trust()
            if name not in given and (used is None or name in used)
        ]
        if used is None:
            asked += [
                f"a link {str(path.relative_to(self.folder))!r} to {os.readlink(path)!r}" for path in self._links()
            ]
        if asked:
            raise ValueError(
                f"{self.named!r} names what can run code or write elsewhere: {', '.join(asked)}. If you trust it add "
                "--trust_run; an option that you give again needs no trust"
            )

    def _of_trust(self) -> Iterator[tuple[str, Any]]:
        for name in (*FUNCTIONS, *OF_OTHERS, "log_with", "tracker_project_name"):
            value = self.options.get(name)
            if value and not self._is_harmless(name, value):
                yield name, value

    def _is_harmless(self, name: str, value: Any) -> bool:
        if name == "reward":
            return value in BUILT_IN_REWARDS
        if name == "prompts":
            return isinstance(value, str) and (":" not in value or existing(value) is not None)
        if name == "project_kwargs":
            return isinstance(value, dict) and set(value) <= {"total_limit"}
        if name == "log_with":
            return value == "tensorboard"
        # a tracker makes a folder of this name
        return name == "tracker_project_name" and str(value).replace("-", "_").isidentifier()

    def _whence(self, name: str) -> str:
        return f" (from {self.import_folders[name]})" if name in self.import_folders else ""

    def _links(self) -> Iterator[Path]:
        """Links in the folder, through which a resumed run would write elsewhere."""
        for folder in (self.folder, self.folder / "checkpoints"):
            if folder.is_dir():
                yield from (path for path in sorted(folder.iterdir()) if path.is_symlink())

    def _find_modules(self, given: Collection[str]) -> None:
        """Lets the run's functions be imported from where they were, whatever the working directory is."""
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        for name, folder in self.import_folders.items():
            if name not in given and Path(folder).is_dir():
                sys.path.insert(0, folder)


def read(named: str) -> EarlierRun:
    """Raises `ValueError` for what is no run."""
    found = checkpoint.find(named)
    # as it is named: a link in there to another run's checkpoints is to be seen
    folder = checkpoint.run_folder_of(named)
    settings = checkpoint.read_state(found) if found is not None else _read_config(folder / "config.json")
    problem = recorded_settings.problem_with(settings)
    if problem or "config" not in settings:
        raise ValueError(f"{named!r} does not say its settings: {problem or 'they are damaged'}, start another run")
    known = {f.name for f in fields(RunArguments)} | {f.name for f in fields(DDPOConfig)}
    options = {**settings["config"], **settings}
    options["full_finetune"] = not settings.get("use_lora", True)
    options["lora_target_modules"] = ",".join(settings.get("lora_target_modules", TRL_TARGETS))
    if isinstance(options.get("project_kwargs"), dict):
        options["project_kwargs"] = {k: v for k, v in options["project_kwargs"].items() if k != "project_dir"}
    folders = settings.get("import_folders") or {}
    return EarlierRun(
        named,
        folder,
        {name: options[name] for name in known.difference(PLACES) if name in options},
        {name: str(folders[name]) for name in FUNCTIONS if name in folders},
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def check_same_kind(run: EarlierRun, given: Collection[str], options: RunArguments) -> None:
    """Raises `ValueError` for options that would train another part of the model than the run has trained."""
    for name in ("full_finetune", *LORA_OPTIONS):
        was, now = run.options.get(name), getattr(options, name)
        if name not in given or name not in run.options or was == now:
            continue
        if name == "full_finetune":
            kind = "all weights" if was else "a LoRA adapter"
            raise ValueError(f"resume_from is {run.named!r}, a run that trained {kind}: leave out --full-finetune")
        raise ValueError(f"resume_from is {run.named!r}, a run with {name} {was}: leave out --{name} {now}")


def import_folder(spec: str) -> str | None:
    """The folder that the module of 'module:function', which is loaded, was imported from; None for what has none."""
    name = spec.partition(":")[0]
    file = getattr(sys.modules.get(name), "__file__", None)
    if ":" not in spec or file is None:
        return None
    levels = name.count(".") + (Path(file).name == "__init__.py")
    return str(Path(file).resolve().parents[levels])
