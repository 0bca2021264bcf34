"""One writer for a folder: a lock that the kernel keeps, and lets go of however the process ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK = ".lock"
# descriptors, and how often they were locked: a second trainer in a notebook may go on with the first one's run
_HELD: dict[Path, tuple[int, int]] = {}


def lock(folder: Path) -> str:
    """Makes this process the only one that writes to `folder`; why it cannot be, or ''.

    The lock is POSIX's: forked children do not have it, and it goes when the process does.
    """
    path = folder.resolve() / LOCK
    if path in _HELD:
        held, times = _HELD[path]
        _HELD[path] = held, times + 1
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
    """Takes one `lock` back; after the last one other processes may write to `folder`."""
    path = folder.resolve() / LOCK
    held, times = _HELD.pop(path, (None, 0))
    if held is not None and times > 1:
        _HELD[path] = held, times - 1
    elif held is not None:
        os.close(held)


def make_new(folder: Path) -> Path:
    """Makes `folder`, or the first of `folder-2`, `folder-3`, ... that nobody else has made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    number, made = 1, folder
    while True:
        try:
            made.mkdir()
            return made
        except FileExistsError:
            number += 1
            made = folder.with_name(f"{folder.name}-{number}")
