"""Checkpoints of a run: written completely or not at all, read without running code, and verified by digests.

checkpoints/checkpoint_7/     after 7 finished epochs
    state.json                epochs, updates, what was trained, settings, the SHA-256 of each file and its own
    training.pt               optimizer, per-prompt statistics, the state of the user's functions
    random_0.pt               random states of process 0, and what else belongs to that process
    unet/ or pytorch_lora_weights.safetensors
checkpoints/.last_epoch/      the same, after the last epoch that `save_freq` leaves out; replaced by the next one
checkpoints/.NAME.partial/    being written; .NAME.old/ is being removed

A resumed run ends with the same bits as one that was not interrupted (on a CPU).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ddpo_fast.processes import run_or_raise_on_all
from ddpo_fast.random_state import random_state
from ddpo_fast.run_folder import files, recorded_settings
from ddpo_fast.run_folder.plain_data import pack, unpack
from ddpo_fast.user_functions import error_line, where_raised

STATE, TRAINING = "state.json", "training.pt"
PREFIX, LAST_EPOCH = "checkpoint_", ".last_epoch"
# the version of this layout
FORMAT = 2
# what state.json must have
NEEDED = ("epochs", "global_step", "trained", "config")
# the name in state.json of the digest of everything else in it
DIGEST = "sha256"


def save(
    folder: Path,
    accelerator: Accelerator,
    state: dict[str, Any],
    training: dict[str, Any],
    process_state: dict[str, Any],
    write_weights: Callable[[Path], None],
    keep: int,
    name: str = "",
    keep_too: Callable[[list[int]], set[int]] = lambda epochs: set(),
) -> Path:
    """Writes `folder/checkpoint_<epochs>` and returns its path. Every process calls it.

    The files are written into a folder of another name, read back, and synced to the disk; then the folder is renamed.
    A kill at any moment leaves either the whole checkpoint or none.

    Args:
        folder: the run's `checkpoints`.
        state: the content of state.json. `healthy` is False after a warning about the epoch's rewards or updates.
        training: the content of training.pt, which is the same in all processes.
        process_state: what belongs to this process, beside its random states.
        write_weights: writes the trained weights into the folder that it is given.
        keep: how many checkpoints stay: the newest, and beside them the newest healthy one.
        name: another name for the folder; with one, no older checkpoint is removed.
        keep_too: of the numbers of epochs of all checkpoints there, those that stay too.

    Raises `OSError` naming the folder if it cannot be written, `ValueError` for what cannot be saved.
    """
    final = folder / (name or f"{PREFIX}{state['epochs']}")
    partial = folder / f".{final.name.removeprefix('.')}.partial"
    main = accelerator.is_main_process

    def make_folder() -> None:
        if main:
            # what a killed run may have left
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write_files() -> None:
        states = {**random_state(), "own": process_state}
        files.write_tensors(partial / f"random_{accelerator.process_index}.pt", states)
        if main:
            _write_training(partial, training, write_weights)

    def rename_into_place() -> None:
        if not main:
            return
        files.follow_umask(partial)
        # the digests need all of the other files
        _write_state(partial, state)
        files.sync_to_disk(partial)
        if final.exists():
            _remove(final)
        partial.rename(final)
        if not name:
            discard_last_epoch(folder)
            # beside the newest, the newest healthy one stays: it is the one to go back to
            healthy, found = newest_healthy(folder), list_in(folder)
            others = keep_too([epochs_of(path) for path in found])
            for old in found[:-keep]:
                if old != healthy and epochs_of(old) not in others:
                    _remove(old)

    try:
        # A stage begins when all processes have finished the one before; an error in one process ends it in all.
        for stage in (make_folder, write_files, rename_into_place):
            run_or_raise_on_all(accelerator, stage)
    except Exception as error:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise _explained(folder, error) from error
    return final


def trial_save(folder: Path, training: dict[str, Any], write_weights: Callable[[Path], None]) -> None:
    """Before training: writes and reads what a checkpoint holds beside the optimizer's state, then removes it.

    Raises `ValueError` for what cannot be saved, `OSError` for a folder that cannot be written.
    """
    trial = folder / ".trial"
    try:
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir(parents=True)
        _write_training(trial, training, write_weights)
    except Exception as error:
        raise _explained(folder, error) from error
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _write_training(folder: Path, training: dict[str, Any], write_weights: Callable[[Path], None]) -> None:
    write_weights(folder)
    files.write_tensors(folder / TRAINING, training)


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    whole = {"format": FORMAT, **state, "files": files.digests(folder)}
    whole[DIGEST] = _state_digest(whole)
    (folder / STATE).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def _state_digest(state: dict[str, Any]) -> str:
    """The SHA-256 of everything in `state` but this digest itself."""
    # JSON turns tuples into lists and keys into strings: the digest must be of what a reader gets
    as_read = json.loads(json.dumps({name: value for name, value in state.items() if name != DIGEST}))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _explained(folder: Path, error: Exception) -> Exception:
    """The error to raise for `error`: one with a remedy if the disk is full or a value cannot be saved, else itself."""
    if reason := files.why_unwritten(error):
        return OSError(
            f"no checkpoint could be written to {folder}: {reason}; make room there, or go on from the last checkpoint "
            "with another output_dir (earlier checkpoints are as they were)"
        )
    # safetensors refuses tensors that are not contiguous, torch.save what cannot be pickled
    if "non contiguous" in str(error) or isinstance(error, (TypeError, AttributeError, RecursionError)):
        return ValueError(f"this run could not be saved in {folder}: {error}")
    return error


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint. It is renamed first: a kill half-way through must not leave a folder that looks whole."""
    old = checkpoint.with_name(f".{checkpoint.name.removeprefix('.')}.old")
    shutil.rmtree(old, ignore_errors=True)
    checkpoint.rename(old)
    shutil.rmtree(old)


def _is_healthy(checkpoint: Path) -> bool:
    try:
        return bool(_parsed_state(checkpoint).get("healthy", True))
    except ValueError:
        return False


def newest_healthy(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was saved without a warning about the rewards or the updates."""
    return next((path for path in reversed(list_in(folder)) if _is_healthy(path)), None)


def promote_last_epoch(folder: Path) -> None:
    """Turns `.last_epoch` into a numbered checkpoint, unless there is one of that epoch already."""
    last = folder / LAST_EPOCH
    if not (last / STATE).exists():
        return
    final = folder / f"{PREFIX}{_parsed_state(last)['epochs']}"
    if final.exists():
        _remove(last)
    else:
        last.rename(final)


def discard_last_epoch(folder: Path) -> None:
    """Removes `.last_epoch`, if it is there."""
    if (folder / LAST_EPOCH).exists():
        _remove(folder / LAST_EPOCH)


def list_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted((p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()), key=epochs_of)


def epochs_of(checkpoint: Path) -> int:
    """The number of whole epochs after which a numbered checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def mark_later_superseded(checkpoint: Path) -> None:
    """Renames the checkpoints of later epochs than this one to `<name>.superseded`.

    A run that is resumed from this one trains those epochs again; a second resumption must not take the old ones.
    """
    for path in list_in(checkpoint.parent):
        if epochs_of(path) > epochs_of(checkpoint):
            number, renamed = 1, path.with_name(f"{path.name}.superseded")
            while renamed.exists():
                number += 1
                renamed = path.with_name(f"{path.name}.superseded-{number}")
            path.rename(renamed)


def find(resume_from: str | Path) -> Path | None:
    """The checkpoint that `resume_from` means: itself, or the newest in a run's folder; None for a run without one.

    Raises `ValueError` for a path that is neither a checkpoint nor a run.
    """
    path = Path(resume_from).expanduser().resolve()
    if (path / STATE).exists():
        return path
    for folder in (path / "checkpoints", path):
        if found := list_in(folder):
            if not (found[-1] / STATE).exists():
                raise ValueError(
                    f"resume_from is {str(resume_from)!r}, but {found[-1].name} there is not a checkpoint of ddpo_fast"
                    f"{_advise_older(found[-1])}"
                )
            return found[-1]
    if (path / "config.json").exists():
        return None
    what = "holds no checkpoint" if path.exists() else "does not exist"
    raise ValueError(f"resume_from is {str(resume_from)!r}, which {what}: give a run's folder or a checkpoint in it")


def run_folder_of(resume_from: str | Path) -> Path:
    """The folder of the run that `resume_from` (its folder, its checkpoints or one checkpoint) belongs to."""
    path = Path(resume_from).expanduser().resolve()
    if path.name.startswith(PREFIX) and path.parent.name == "checkpoints":
        path = path.parent
    return path.parent if path.name == "checkpoints" else path


def continues_in(folder: Path, resume_from: str) -> bool:
    """Whether `resume_from` names the run in `folder`, which then is continued in place; False if it is ''."""
    here = folder.expanduser().resolve()
    if not resume_from or (here / STATE).exists():
        return False
    return run_folder_of(resume_from) == here


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json. Raises `ValueError` if it is damaged or of another format, naming the checkpoint to use instead."""
    try:
        return _parsed_state(checkpoint)
    except ValueError as error:
        raise ValueError(f"{error}{_advise_older(checkpoint)}") from None


def _parsed_state(checkpoint: Path) -> dict[str, Any]:
    try:
        text = (checkpoint / STATE).read_text(encoding="utf-8")
        state = json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint} cannot be read: its {STATE} is damaged ({error})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{checkpoint} cannot be read: its {STATE} is not a JSON object")
    if state.get("format") != FORMAT:
        raise ValueError(f"{checkpoint} has format {state.get('format')!r}; this version reads format {FORMAT}")
    if missing := [name for name in NEEDED if name not in state]:
        raise ValueError(f"{checkpoint} cannot be read: its {STATE} does not say {missing[0]!r}")
    if problem := recorded_settings.problem_with(state):
        raise ValueError(f"{checkpoint} cannot be read: its {STATE} is damaged ({problem})")
    if DIGEST in state and (state[DIGEST] != _state_digest(state) or not text.endswith("\n")):
        raise ValueError(f"{checkpoint} cannot be read: its {STATE} is damaged, or was changed by hand")
    return state


def verify(checkpoint: Path) -> None:
    """Raises `ValueError` if a file is not as it was written, naming it and the checkpoint to use instead."""
    if problem := _damage(checkpoint):
        raise ValueError(f"{problem}{_advise_older(checkpoint)}")


def _damage(checkpoint: Path) -> str:
    """The first file that is missing or differs from its digest, in a sentence, or ''."""
    try:
        state = _parsed_state(checkpoint)
        # the files of a checkpoint without digests, which an earlier version wrote, are read to find damage
        known = state.get("files") or {f"random_{i}.pt": "" for i in range(state.get("num_processes", 1))}
        for name, digest in known.items():
            if not (checkpoint / name).is_file():
                return f"{checkpoint} is damaged: {name} is missing"
            if digest and files.digest(checkpoint / name) != digest:
                return f"{checkpoint} is damaged: {name} is not as it was written"
        if "files" not in state:
            read_training(checkpoint)
            for name in known:
                files.read_tensors(checkpoint / name)
    except ValueError as error:
        return str(error)
    return ""


def _advise_older(checkpoint: Path) -> str:
    """The end of a message: the newest earlier checkpoint that is not damaged, or nothing if there is none."""
    for older in reversed(list_in(checkpoint.parent)):
        digits = checkpoint.name.removeprefix(PREFIX)
        if digits.isdigit() and int(older.name.removeprefix(PREFIX)) < int(digits) and not _damage(older):
            return f": go on from the one before it with --resume_from {older}"
    return ""


def read_training(checkpoint: Path) -> dict[str, Any]:
    """training.pt. Raises `ValueError` if it cannot be read as plain data."""
    return files.read_tensors(checkpoint / TRAINING)


def function_states(functions: dict[str, Any]) -> dict[str, Any]:
    """The `state_dict()` of each function that has state, as plain data.

    Raises `ValueError` naming the function whose `state_dict` raised or returned anything else.
    """
    return {
        name: pack(_call_users(f"{name}.state_dict()", function.state_dict), f"{name}.state_dict()")
        for name, function in functions.items()
    }


def load_function_states(functions: dict[str, Any], training: dict[str, Any]) -> None:
    """Gives each function its state in `training`. Raises `ValueError` naming one whose `load_state_dict` raised."""
    for name, function in functions.items():
        if name in training:
            _call_users(f"{name}.load_state_dict()", function.load_state_dict, unpack(training[name]))


def _call_users(name: str, method: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return method(*arguments)
    except Exception as error:
        raise ValueError(f"{name} raised {error_line(error)} ({where_raised(error)})") from error


def describe_trained_weights(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, Any]:
    """Identifies a run's trained weights: their number, and a hash of their names and shapes."""
    # ZeRO stage 3 splits a parameter and leaves it empty, with its shape in `ds_shape`
    shapes = sorted((name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in named_parameters if p.requires_grad)
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
    return {
        "tensors": len(shapes),
        "weights": sum(math.prod(shape) for _, shape in shapes),
        "lora": any("lora_" in name for name, _ in shapes),
        "digest": digest,
    }


def check_trained_weights_match(checkpoint: Path, saved: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises `ValueError` if the checkpoint's trained weights are not the ones that this run trains."""
    if saved.keys() != mine.keys():
        raise ValueError(f"{checkpoint} is damaged: it does not say what was trained")
    if saved != mine:
        was, now = (
            f"{'a LoRA adapter' if part['lora'] else 'a whole UNet'} of {part['weights']:,} weights "
            f"in {part['tensors']} tensors"
            for part in (saved, mine)
        )
        raise ValueError(f"{checkpoint} is of another run: it trained {was}, this run trains {now}")


def read_random_state(checkpoint: Path, process: int) -> dict[str, Any] | None:
    """The random states of process number `process`; None if fewer processes have saved the checkpoint."""
    path = checkpoint / f"random_{process}.pt"
    return files.read_tensors(path) if path.exists() else None
