"""Runs commands in processes of their own, which may take as long as a busy machine needs, and reads their records."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
# the package, its kernels and the tests' own modules
PYTHONPATH = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
# A process that is silent for so long hangs. What the tests run prints something every few seconds, except for
# compilers, which take a minute or two, and all of it takes several times as long on a busy machine.
SILENCE_S = 1800
# Nothing that the tests run in another process compiles with Dynamo, but bitsandbytes, which diffusers imports,
# prepares to: a sixth of the processor time that a process takes to import the trainer.
UNCOMPILED = {"TORCHDYNAMO_DISABLE": "1"}


def environment(**variables: str) -> dict[str, str]:
    """This process's environment variables with the repository's packages on the path, and with `variables`."""
    return {**os.environ, **UNCOMPILED, "PYTHONPATH": PYTHONPATH, **variables}


def finish(command: Sequence[Any], status: int | None = 0, **options: Any) -> subprocess.CompletedProcess:
    """Runs a command to its end: `subprocess.run` with its output as text, and a limit on silence, not on time.

    Args:
        status: the exit status that it must end with; None accepts any.
        options: those of `subprocess.Popen`.
    """
    command = [str(word) for word in command]
    options["env"] = {**UNCOMPILED, **options.get("env", os.environ)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True, **options)
        try:
            wait(process, (out, err))
        finally:
            if process.poll() is None:
                # torchrun passes the signal on to the processes that it started
                process.terminate()
                process.wait()
            out.seek(0), err.seek(0)
            done = subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())
    assert status in (None, done.returncode), f"{done.returncode}: {done.stdout[-3000:]}\n{done.stderr[-4000:]}"
    return done


def wait(process: subprocess.Popen, files: Sequence[IO[str]]) -> None:
    """Waits for a process that writes to `files`. Raises `TimeoutError` if they have not grown for `SILENCE_S`."""
    size, since = -1, time.monotonic()
    while True:
        try:
            process.wait(timeout=5)
            return
        except subprocess.TimeoutExpired:
            now = sum(file.seek(0, 2) for file in files)
        if now > size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > SILENCE_S:
            raise TimeoutError(f"{process.args} hangs: it has written nothing for {SILENCE_S} s")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON objects, such as metrics.jsonl or the records of a benchmark."""
    return [json.loads(line) for line in path.read_text().splitlines()]
