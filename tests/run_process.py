"""Commands in processes of their own, which may take as long as a busy machine needs."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import IO

# without a word: whatever the tests run takes seconds, and some of it compiles for a minute or two
PATIENCE_S = 1800


def finish(command: Sequence[str], **options) -> subprocess.CompletedProcess:
    """Runs a command to its end: `subprocess.run` with its output as text, and a limit on silence, not on time."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True, **options)
        try:
            wait(process, (out, err))
        finally:
            if process.poll() is None:
                # torchrun ends those that it has started
                process.terminate()
                process.wait()
            out.seek(0), err.seek(0)
            done = subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())
        return done


def wait(process: subprocess.Popen, files: Sequence[IO[str]]) -> None:
    """Waits for a process that writes to `files`. Raises `TimeoutError` if it hangs."""
    said, since = -1, time.monotonic()
    while True:
        try:
            process.wait(timeout=5)
            return
        except subprocess.TimeoutExpired:
            now = sum(file.seek(0, 2) for file in files)
        if now > said:
            said, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE_S:
            raise TimeoutError(f"{process.args} hangs: it has said nothing for {PATIENCE_S} s")
