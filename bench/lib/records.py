"""Records of benchmarks: files of JSON lines in `bench/records`, and the facts that every line carries."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lib import RECORDS, ROOT

Row = dict[str, Any]


def facts(device_type: str) -> Row:
    """The commit, the date, the machine and the versions."""
    # records do not count as changes: the first one that is written would mark all that follow as of a changed tree
    changes = _output_of("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/records")
    power, driver = _power_and_driver() if device_type == "cuda" else (None, None)
    return {
        "commit": _output_of("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device_type),
        "power_limit_w": power,
        "driver": driver,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """The versions of packages, None for one that is not installed."""
    return {package: _version(package) for package in packages}


def device_name(device_type: str) -> str:
    """The GPU's name, or the processor's as Linux knows it."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    names = re.findall(r"model name\s*: (.+)", cpuinfo)
    return names[0] if names else platform.machine()


def default_file(benchmark: str, device: str) -> Path:
    """Where a benchmark's records go unless --output names a file: `bench/records/BENCHMARK-DEVICE.jsonl`."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return RECORDS / f"{benchmark}-{slug}.jsonl"


def read(files: Iterable[Path]) -> list[Row]:
    """The rows of all the files."""
    return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a file, which is made with its folder if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _output_of(*command: str) -> str | None:
    """What a command prints, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _power_and_driver() -> tuple[float | None, str | None]:
    """The first GPU's power limit in watts and the driver's version. A card without a limit prints `[N/A]`."""
    printed = _output_of("nvidia-smi", "--query-gpu=power.limit,driver_version", "--format=csv,noheader,nounits")
    if not printed:
        return None, None
    power, driver = printed.splitlines()[0].split(", ")
    return (float(power) if power.replace(".", "", 1).isdigit() else None), driver


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
