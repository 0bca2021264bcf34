"""Checkpoints that are whole or absent, hold only data, and bring a killed run back to the same bits.

checkpoints/checkpoint_7/     7 finished epochs
    state.json                epochs, updates, what was trained, settings, the digests of all files and its own
    training.pt               optimizer, per-prompt statistics, the functions' own state (`weights_only` loads it)
    random_0.pt               random states of process 0, and what else is its own
    unet/ or pytorch_lora_weights.safetensors
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ddpo_fast.processes import run_or_raise_on_all
from ddpo_fast.run_folder import files, recorded_settings
from ddpo_fast.run_folder.plain_data import pack, unpack
from ddpo_fast.user_functions import error_line, where_raised

STATE, TRAINING = "state.json", "training.pt"
PREFIX = "checkpoint_"
FORMAT = 2
# what state.json must say, and the digest of all that it says
NEEDED, SEAL = ("epochs", "global_step", "trained", "config"), "sha256"
# the state after an epoch that save_freq leaves out, until the next one
LAST_EPOCH = ".last_epoch"


def save(
    folder: Path,
    accelerator: Accelerator,
    state: dict[str, Any],
    training: dict[str, Any],
    own: dict[str, Any],
    write_weights: Callable[[Path], None],
    keep: int,
    name: str = "",
) -> Path:
    """Writes `folder/checkpoint_<epochs>` aside, reads it back, renames it into place, then removes all but the newest
    `keep` and the newest whose state is `healthy`.

    Every process calls it: each stores its random state and what else is its `own`, the main one the rest. Under
    another `name` nothing else is removed. Raises `OSError` naming the folder if it cannot be written.
    """
    final = folder / (name or f"{PREFIX}{state['epochs']}")
    aside = folder / f".{final.name.removeprefix('.')}.partial"
    main = accelerator.is_main_process

    def begin() -> None:
        if main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def write() -> None:
        _write(aside / f"random_{accelerator.process_index}.pt", {**random_state(), "own": own})
        if main:
            _write_training(aside, training, write_weights)

    def finish() -> None:
        if not main:
            return
        files.follow_umask(aside)
        _write_state(aside, state)
        files.sync_to_disk(aside)
        if final.exists():
            _remove(final)
        aside.rename(final)
        if not name:
            discard_last_epoch(folder)
            for old in _superfluous(folder, keep):
                _remove(old)

    try:
        for part in (begin, write, finish):
            run_or_raise_on_all(accelerator, part)
    except Exception as error:
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        raise _unwritten(folder, error) from error
    return final


def trial_save(folder: Path, training: dict[str, Any], write_weights: Callable[[Path], None]) -> None:
    """Writes into `folder` what a checkpoint holds beside the optimizer's state, reads it back, and removes it.

    Raises `ValueError` for what cannot be saved, `OSError` for a folder that cannot be written.
    """
    trial = folder / ".trial"
    try:
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir(parents=True)
        _write_training(trial, training, write_weights)
    except Exception as error:
        raise _unwritten(folder, error) from error
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _write_training(aside: Path, training: dict[str, Any], write_weights: Callable[[Path], None]) -> None:
    write_weights(aside)
    _write(aside / TRAINING, training)


def _write(path: Path, data: dict[str, Any]) -> None:
    """Writes plain data, and proves that it can be read."""
    # given a file and not a path, torch passes on what the system said about a full disk
    with path.open("wb") as file:
        torch.save(data, file)
    _read(path)


def _write_state(aside: Path, state: dict[str, Any]) -> None:
    whole = {"format": FORMAT, **state, "files": files.digests(aside)}
    whole[SEAL] = _seal(whole)
    (aside / STATE).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def _seal(state: dict[str, Any]) -> str:
    # as JSON gives it back
    said = json.loads(json.dumps({name: value for name, value in state.items() if name != SEAL}))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _unwritten(folder: Path, error: Exception) -> Exception:
    """What a user is told of a checkpoint that could not be written."""
    if reason := files.why_unwritten(error):
        return OSError(
            f"no checkpoint could be written to {folder}: {reason}; make room there, or go on from the last checkpoint "
            "with another output_dir (earlier checkpoints are as they were)"
        )
    if "non contiguous" in str(error) or isinstance(error, (TypeError, AttributeError, RecursionError)):
        return ValueError(f"this run could not be saved in {folder}: {error}")
    return error


def _remove(checkpoint: Path) -> None:
    """Renamed first: a kill half-way through must not leave a folder that looks whole."""
    doomed = checkpoint.with_name(f".{checkpoint.name.removeprefix('.')}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _superfluous(folder: Path, keep: int) -> list[Path]:
    found = list_in(folder)
    good = next((path for path in reversed(found) if _is_healthy(path)), None)
    return [path for path in found[:-keep] if path != good]


def _is_healthy(checkpoint: Path) -> bool:
    try:
        return bool(_parsed_state(checkpoint).get("healthy", True))
    except ValueError:
        return False


def newest_healthy(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` from before anything looked wrong."""
    return next((path for path in reversed(list_in(folder)) if _is_healthy(path)), None)


def promote_last_epoch(folder: Path) -> None:
    """Makes a checkpoint of the state after the last whole epoch, if there is none of it yet."""
    last = folder / LAST_EPOCH
    if not (last / STATE).exists():
        return
    final = folder / f"{PREFIX}{_parsed_state(last)['epochs']}"
    if final.exists():
        _remove(last)
    else:
        last.rename(final)


def discard_last_epoch(folder: Path) -> None:
    """Removes what `promote_last_epoch` would keep."""
    if (folder / LAST_EPOCH).exists():
        _remove(folder / LAST_EPOCH)


def list_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def mark_later_superseded(checkpoint: Path) -> None:
    """Renames the checkpoints after this one: a run that goes on from here must not be resumed from those."""
    for path in list_in(checkpoint.parent):
        if int(path.name.removeprefix(PREFIX)) > int(checkpoint.name.removeprefix(PREFIX)):
            number, aside = 1, path.with_name(f"{path.name}.superseded")
            while aside.exists():
                number += 1
                aside = path.with_name(f"{path.name}.superseded-{number}")
            path.rename(aside)


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
                    f"{_instead_of(found[-1])}"
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
    """Whether `resume_from` names the run in `folder`, so that it is continued there; False for no resumption."""
    here = folder.expanduser().resolve()
    if not resume_from or (here / STATE).exists():
        return False
    return run_folder_of(resume_from) == here


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json`; raises `ValueError` if it is broken or of a later format, naming the checkpoint to use instead."""
    try:
        return _parsed_state(checkpoint)
    except ValueError as error:
        raise ValueError(f"{error}{_instead_of(checkpoint)}") from None


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
    if SEAL in state and (state[SEAL] != _seal(state) or not text.endswith("\n")):
        raise ValueError(f"{checkpoint} cannot be read: its {STATE} is damaged, or was changed by hand")
    return state


def verify(checkpoint: Path) -> None:
    """Raises `ValueError` if a file is not as it was written, naming it and the checkpoint to use instead."""
    if problem := _damage(checkpoint):
        raise ValueError(f"{problem}{_instead_of(checkpoint)}")


def _damage(checkpoint: Path) -> str:
    try:
        state = _parsed_state(checkpoint)
        # checkpoints of earlier versions have no digests
        known = state.get("files") or {f"random_{i}.pt": "" for i in range(state.get("num_processes", 1))}
        for name, digest in known.items():
            if not (checkpoint / name).is_file():
                return f"{checkpoint} is damaged: {name} is missing"
            if digest and files.digest(checkpoint / name) != digest:
                return f"{checkpoint} is damaged: {name} is not as it was written"
        if "files" not in state:
            read_training(checkpoint)
            for name in known:
                _read(checkpoint / name)
    except ValueError as error:
        return str(error)
    return ""


def _instead_of(checkpoint: Path) -> str:
    for older in reversed(list_in(checkpoint.parent)):
        digits = checkpoint.name.removeprefix(PREFIX)
        if digits.isdigit() and int(older.name.removeprefix(PREFIX)) < int(digits) and not _damage(older):
            return f": go on from the one before it with --resume_from {older}"
    return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path.parent} is damaged: {path.name} cannot be read ({reason:.200})") from error


def read_training(checkpoint: Path) -> dict[str, Any]:
    """`training.pt`; raises `ValueError` if it cannot be read as plain data."""
    return _read(checkpoint / TRAINING)


def function_states(functions: dict[str, Any]) -> dict[str, Any]:
    """The `state_dict()` of each, as plain data. Raises `ValueError` for one that raised, or gave something else."""
    return {
        name: pack(_called(f"{name}.state_dict()", function.state_dict), f"{name}.state_dict()")
        for name, function in functions.items()
    }


def load_function_states(functions: dict[str, Any], training: dict[str, Any]) -> None:
    """Gives each what `function_states` kept of it."""
    for name, function in functions.items():
        if name in training:
            _called(f"{name}.load_state_dict()", function.load_state_dict, unpack(training[name]))


def _called(name: str, method: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return method(*arguments)
    except Exception as error:
        raise ValueError(f"{name} raised {error_line(error)} ({where_raised(error)})") from error


def describe_trained_weights(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, Any]:
    """What tells one run's trained weights from another's: their number and a hash of names and shapes."""
    # DeepSpeed's stage 3 leaves parameters without elements
    shapes = sorted((name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in named_parameters if p.requires_grad)
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
    return {
        "tensors": len(shapes),
        "weights": sum(int(np.prod(shape)) for _, shape in shapes),
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


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, as plain data."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])


def read_random_state(checkpoint: Path, process: int) -> dict[str, Any] | None:
    """The random states of a process, or None for one that the saving run did not have."""
    path = checkpoint / f"random_{process}.pt"
    return _read(path) if path.exists() else None
