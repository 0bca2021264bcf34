"""File functions for checkpoints and saved models: digests, tensors, modes, syncing, and reasons of failed writes."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

# bytes that `digest` reads at a time
BLOCK = 2**22
# error numbers of a full disk, a used-up quota and a file size limit
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The digest of each file below `folder`, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest(path) for path in files}


def write_tensors(path: Path, data: dict[str, Any]) -> None:
    """Writes tensors and plain data by `torch.save`, and reads them back as a resumed run would."""
    # given a file and not a path, torch raises the system's own error for a full disk
    with path.open("wb") as file:
        torch.save(data, file)
    read_tensors(path)


def read_tensors(path: Path) -> dict[str, Any]:
    """A file of `write_tensors`, loaded as tensors and plain data only. Raises `ValueError` if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # torch, zipfile and pickle raise errors of many types for damaged bytes
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path.parent} is damaged: {path.name} cannot be read ({reason:.200})") from error


def follow_umask(folder: Path, *patterns: str) -> None:
    """Gives files below `folder` the mode of this user's new files, because safetensors creates its own with 0600.

    Args:
        patterns: for `Path.glob`; all files without any.
    """
    # `os.umask` returns the umask only by setting another one, for all threads of the process. The mode of a new file
    # shows it without that.
    plain = folder / ".mode"
    plain.touch()
    mode = plain.stat().st_mode
    plain.unlink()
    for path in (path for pattern in patterns or ("**/*",) for path in folder.glob(pattern)):
        if path.is_file() and path.stat().st_mode != mode:
            path.chmod(mode)


def sync_to_disk(folder: Path) -> None:
    """Waits until everything below `folder` is on the disk, so that a power cut loses none of it."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def why_unwritten(error: Exception) -> str:
    """Why a file could not be written, in a few words, or '' for an error of another kind."""
    # libraries raise errors of their own, with the system's as the cause or the context
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    if any(getattr(c, "errno", None) in FULL or "No space left" in str(c) for c in causes):
        return "No space left on device"
    # safetensors and torch's writer put the system's error into the text of their own
    if isinstance(error, OSError) or "os error" in str(error) or "PytorchStreamWriter" in str(error):
        return str(error).splitlines()[0]
    return ""
