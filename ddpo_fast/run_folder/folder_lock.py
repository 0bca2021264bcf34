"""A lock on a run's folder, so that one process writes to it. The kernel releases it however the process ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK = ".lock"
# By lock file: its descriptor, and how often this process has locked it. A second trainer in the same process, as in a
# notebook, may continue the first one's run.
_HELD: dict[Path, tuple[int, int]] = {}


def lock(folder: Path) -> str:
    """Locks `folder` for this process; returns '', or a sentence naming the process that holds the lock.

    A POSIX lock: a forked child does not inherit it, and the kernel releases it when the process ends.
    """
    path = folder.resolve() / LOCK
    if path in _HELD:
        descriptor, count = _HELD[path]
        _HELD[path] = descriptor, count + 1
        return ""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return (
                f"{str(folder)!r} is being written to by {holder or 'another process'}: wait for its end, stop it, or "
                "choose another output_dir (a notebook's trainer counts until its kernel ends)"
            )
        logger.warning("%s is on a file system without locks: see that no other run writes there (%s)", folder, error)
        return ""
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _HELD[path] = descriptor, 1
    return ""


def unlock(folder: Path) -> None:
    """Undoes one `lock`; after the last one other processes may lock `folder`."""
    path = folder.resolve() / LOCK
    descriptor, count = _HELD.pop(path, (None, 0))
    if descriptor is not None and count > 1:
        _HELD[path] = descriptor, count - 1
    elif descriptor is not None:
        # closing the file releases the lock
        os.close(descriptor)


def make_new(folder: Path) -> Path:
    """Makes `folder`, or if it exists the first of `folder-2`, `folder-3`, ... that does not, and returns its path."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    number, made = 1, folder
    while True:
        try:
            made.mkdir()
            return made
        except FileExistsError:
            number += 1
            made = folder.with_name(f"{folder.name}-{number}")
