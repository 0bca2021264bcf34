"""Checkpoints that are whole or absent, hold only data, and bring a killed run back to the same bits.

checkpoints/checkpoint_7/     7 finished epochs
    state.json                epochs, updates, what was trained, settings
    training.pt               optimizer, per-prompt statistics, the functions' own state (`weights_only` loads it)
    random_0.pt               random states of process 0, and what else is its own
    unet/ or pytorch_lora_weights.safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

STATE, TRAINING = "state.json", "training.pt"
PREFIX = "checkpoint_"
FORMAT = 2


def save(
    folder: Path,
    accelerator: Accelerator,
    state: dict[str, Any],
    training: dict[str, Any],
    own: dict[str, Any],
    write_weights: Callable[[Path], None],
    keep: int,
) -> Path:
    """Writes `folder/checkpoint_<epochs>` aside, renames it into place, then removes all but the newest `keep`.

    Every process calls it: each stores its random state and what else is its `own`, the main one the rest.
    """
    final = folder / f"{PREFIX}{state['epochs']}"
    aside = folder / f".{final.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    torch.save({**random_state(), "own": own}, aside / f"random_{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        write_weights(aside)
        torch.save(training, aside / TRAINING)
        (aside / STATE).write_text(json.dumps({"format": FORMAT, **state}, indent=2) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _sync_to_disk(aside)
        if final.exists():
            _remove(final)
        aside.rename(final)
        for old in numbered(folder)[:-keep]:
            _remove(old)
    accelerator.wait_for_everyone()
    return final


def _sync_to_disk(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    """Renamed first: a kill half-way through must not leave a folder that looks whole."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def set_aside_later(checkpoint: Path) -> None:
    """Renames the checkpoints after this one: a run that goes on from here must not be resumed from those."""
    for path in numbered(checkpoint.parent):
        if int(path.name.removeprefix(PREFIX)) > int(checkpoint.name.removeprefix(PREFIX)):
            path.rename(path.with_name(f"{path.name}.superseded"))


def find(resume_from: str | Path) -> Path | None:
    """The checkpoint that `resume_from` means: itself, or the newest in a run's folder; None for a run without one.

    Raises `ValueError` for a path that is neither a checkpoint nor a run.
    """
    path = Path(resume_from).expanduser().resolve()
    if (path / STATE).exists():
        return path
    for folder in (path / "checkpoints", path):
        if found := numbered(folder):
            if not (found[-1] / STATE).exists():
                raise ValueError(
                    f"resume_from is {str(resume_from)!r}, but {found[-1].name} there is not a checkpoint of ddpo_fast"
                )
            return found[-1]
    if (path / "config.json").exists():
        return None
    what = "holds no checkpoint" if path.exists() else "does not exist"
    raise ValueError(f"resume_from is {str(resume_from)!r}, which {what}: give a run's folder or a checkpoint in it")


def run_folder(resume_from: str | Path) -> Path:
    """The folder of the run that `resume_from` (its folder, its checkpoints or one checkpoint) belongs to."""
    path = Path(resume_from).expanduser().resolve()
    if path.name.startswith(PREFIX):
        path = path.parent
    return path.parent if path.name == "checkpoints" else path


def goes_on_in(folder: Path, resume_from: str) -> bool:
    """Whether `resume_from` names the run in `folder`, so that it is continued there; False for no resumption."""
    return bool(resume_from) and run_folder(resume_from) == folder.expanduser().resolve()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json`; raises `ValueError` if it is broken or of a later format."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint} cannot be read: {error}") from None
    if state.get("format") != FORMAT:
        raise ValueError(f"{checkpoint} has format {state.get('format')!r}; this version reads format {FORMAT}")
    return state


def read_training(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True, mmap=True)


def trained_part(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, Any]:
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


def check_same_part(checkpoint: Path, saved: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises `ValueError` if the checkpoint's trained weights are not the ones that this run trains."""
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
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
