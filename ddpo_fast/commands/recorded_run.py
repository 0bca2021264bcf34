"""The options that a run recorded in its folder, which `train` resumes from and `sample` draws with.

The folder may come from somebody else, and its files may name modules to import and settings of other programs (a
tracker's address, a DeepSpeed file). Those are used only if the user asks for them: by `--trust_run`, or by giving the
option again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ddpo_fast.commands.options import TRL_TARGETS, RunArguments
from ddpo_fast.commands.reward_options import RewardArguments
from ddpo_fast.config import PLACE_FIELDS, DDPOConfig
from ddpo_fast.prompts import names_function
from ddpo_fast.recipes import LORA_SETTINGS
from ddpo_fast.rewards import is_local
from ddpo_fast.run_folder import checkpoint, recorded_settings

# options that may name a function to import
FUNCTIONS = ("reward", "prompts", "eval_reward", "eval_prompts", "sample_prompts")
# where images and prompts are sent to, with the user's password in the environment, and arguments of any meaning
SERVERS = ("reward_url", "reward_options")
# settings of other programs, which can name files and addresses, and the one that sends the model to the Hub
OTHER_PROGRAMS = ("accelerator_kwargs", "project_kwargs", "tracker_kwargs", "deepspeed", "push_to_hub", "hub_model_id")


@dataclass
class RecordedRun:
    """What a run's `state.json` or `config.json` says.

    Args:
        named: the path that the user gave, for messages.
        folder: the run's folder.
        options: recorded values by option name.
        import_folders: of each option in `FUNCTIONS`, the folders that its functions' modules were imported from, with
            `os.pathsep` between them.
    """

    named: str
    folder: Path
    options: dict[str, Any]
    import_folders: dict[str, str]

    def check_trust(self, given: Collection[str], trusts: bool, used: Collection[str] | None = None) -> None:
        """Raises `ValueError` naming what can run code or write elsewhere, unless the user trusts the run.

        Args:
            given: the options on the command line, which replace the recorded ones and need no trust.
            trusts: whether `--trust_run` is given; the functions' modules then can be imported from where they were.
            used: the options that will be used; None for all, and for writing into the run's folder.
        """
        if trusts:
            self._add_import_folders(given)
            return
        problems = [
            f"{name}={value!r}{self._import_note(name)}"
            for name, value in self._needing_trust()
            if name not in given and (used is None or name in used)
        ]
        if used is None:
            problems += [
                f"a link {str(path.relative_to(self.folder))!r} to {os.readlink(path)!r}" for path in self._links()
            ]
        if problems:
            raise ValueError(
                f"{self.named!r} names what can run code or write elsewhere: {', '.join(problems)}. If you trust it "
                "add --trust_run; an option that you give again needs no trust"
            )

    def forget_how_rewards_are_made(self) -> None:
        """Drops the arguments of the recorded reward, for a run or a picture with another one."""
        for option in fields(RewardArguments):
            self.options.pop(option.name, None)

    def _needing_trust(self) -> Iterator[tuple[str, Any]]:
        for name in (*FUNCTIONS, *SERVERS, *OTHER_PROGRAMS, "log_with", "tracker_project_name"):
            value = self.options.get(name)
            if value and not self._is_harmless(name, value):
                yield name, value

    def _is_harmless(self, name: str, value: Any) -> bool:
        if name in ("reward", "eval_reward"):
            return _is_local_reward(value)
        if name in ("prompts", "eval_prompts", "sample_prompts"):
            return isinstance(value, str) and not names_function(value)
        if name == "project_kwargs":
            return isinstance(value, dict) and set(value) <= {"total_limit"}
        if name == "log_with":
            return value == "tensorboard"
        # A tracker makes a folder of this name: an identifier cannot be a path to somewhere else.
        return name == "tracker_project_name" and str(value).replace("-", "_").isidentifier()

    def _import_note(self, name: str) -> str:
        return f" (from {self.import_folders[name]})" if name in self.import_folders else ""

    def _links(self) -> Iterator[Path]:
        """Links in the folder, through which a resumed run would write elsewhere."""
        for folder in (self.folder, self.folder / "checkpoints"):
            if folder.is_dir():
                yield from (path for path in sorted(folder.iterdir()) if path.is_symlink())

    def _add_import_folders(self, given: Collection[str]) -> None:
        """Adds to `sys.path` the folders that the recorded functions were imported from, before the working directory.

        The run can then be resumed from another working directory than the one it was started in.
        """
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        for name, folders in self.import_folders.items():
            for folder in folders.split(os.pathsep) if name not in given else ():
                if Path(folder).is_dir():
                    sys.path.insert(0, folder)


def _is_local_reward(spec: Any) -> bool:
    try:
        return is_local(spec)
    # not a string, or not the names of rewards
    except (AttributeError, ValueError):
        return False


def read(named: str) -> RecordedRun:
    """The run or checkpoint at the path `named`. Raises `ValueError` for a path that is no run, or a damaged one."""
    found = checkpoint.find(named)
    # From the path as the user gave it: the checkpoint that was found may be behind a link to another run's folder,
    # which `_links` has to see.
    folder = checkpoint.run_folder_of(named)
    settings = checkpoint.read_state(found) if found is not None else _read_config(folder / "config.json")
    problem = recorded_settings.problem_with(settings)
    if problem or "config" not in settings:
        raise ValueError(f"{named!r} does not say its settings: {problem or 'they are damaged'}, start another run")
    # Unknown names are left out: other versions may have other options.
    known = {f.name for f in fields(RunArguments)} | {f.name for f in fields(DDPOConfig)}
    options = {**settings["config"], **settings}
    options["full_finetune"] = not settings.get("use_lora", True)
    options["lora_target_modules"] = ",".join(settings.get("lora_target_modules", TRL_TARGETS))
    if isinstance(options.get("project_kwargs"), dict):
        options["project_kwargs"] = {k: v for k, v in options["project_kwargs"].items() if k != "project_dir"}
    folders = settings.get("import_folders") or {}
    return RecordedRun(
        named,
        folder,
        # A run's folder may have been moved or copied: where the resumed run writes is not taken from its files.
        {name: options[name] for name in known.difference(PLACE_FIELDS) if name in options},
        {name: str(folders[name]) for name in FUNCTIONS if name in folders},
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def check_trains_same_part(run: RecordedRun, given: Collection[str], options: RunArguments) -> None:
    """Raises `ValueError` for given options that would train other weights of the model than the run trained."""
    for name in ("full_finetune", *LORA_SETTINGS):
        was, now = run.options.get(name), getattr(options, name)
        if name not in given or name not in run.options or was == now:
            continue
        if name == "full_finetune":
            kind = "all weights" if was else "a LoRA adapter"
            raise ValueError(f"resume_from is {run.named!r}, a run that trained {kind}: leave out --full-finetune")
        raise ValueError(f"resume_from is {run.named!r}, a run with {name} {was}: leave out --{name} {now}")


def check_same_recipe(run: RecordedRun, given: Collection[str], options: RunArguments) -> None:
    """Raises `ValueError` for a `--recipe` that is not the recorded one: a resumed run has its recorded settings.

    The recorded one may be given, as the command that began a run is then also the one that resumes it.
    """
    if "recipe" in given and options.recipe != run.options.get("recipe"):
        raise ValueError(
            f"resume_from is {run.named!r}, a run that goes on with its own settings: leave out --recipe "
            f"{options.recipe}, or give single settings as options"
        )


def import_folders(*specs: str) -> str:
    """The folders in `sys.path` that the loaded modules of each 'module:function' were found in; see `RecordedRun`."""
    return os.pathsep.join(dict.fromkeys(filter(None, map(_import_folder, specs))))


def _import_folder(spec: str) -> str:
    name = spec.partition(":")[0]
    file = getattr(sys.modules.get(name), "__file__", None)
    if ":" not in spec or file is None:
        return ""
    # a.b.c:f is in <folder>/a/b/c.py, or in <folder>/a/b/c/__init__.py
    levels = name.count(".") + (Path(file).name == "__init__.py")
    return str(Path(file).resolve().parents[levels])
