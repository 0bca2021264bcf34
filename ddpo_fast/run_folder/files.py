"""A run's files: what tells that they are whole, who may read them, and that they have reached the disk."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

BLOCK = 2**22
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


def follow_umask(folder: Path, *patterns: str) -> None:
    """Gives files below `folder` the mode of this user's new files, because safetensors creates its own with 0600.

    Args:
        patterns: for `Path.glob`; all files without any.
    """
    # asking for the umask means setting it, for all threads of the process: a new file shows what it leaves
    plain = folder / ".mode"
    plain.touch()
    mode = plain.stat().st_mode
    plain.unlink()
    for path in (path for pattern in patterns or ("**/*",) for path in folder.glob(pattern)):
        if path.is_file() and path.stat().st_mode != mode:
            path.chmod(mode)


def sync_to_disk(folder: Path) -> None:
    """Returns when everything below `folder` would outlive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def why_unwritten(error: Exception) -> str:
    """What kept a library from writing a file, or '' for an error of another kind."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    if any(getattr(c, "errno", None) in FULL or "No space left" in str(c) for c in causes):
        return "No space left on device"
    # safetensors and torch wrap what the system said
    if isinstance(error, OSError) or "os error" in str(error) or "PytorchStreamWriter" in str(error):
        return str(error).splitlines()[0]
    return ""
