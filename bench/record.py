"""What every benchmark record carries, and where records go."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import paths
import torch
from timing import Clock


def facts(device_type: str) -> dict[str, Any]:
    """The commit, the date, the machine and the versions."""
    # records themselves do not make a tree dirty: the first one would make all that follow it so
    changes = _said("git", "-C", str(paths.ROOT), "status", "--porcelain", "--", ".", ":!bench/records")
    power, driver = _power_and_driver() if device_type == "cuda" else (None, None)
    return {
        "commit": _said("git", "-C", str(paths.ROOT), "rev-parse", "HEAD"),
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
    """Those of installed packages, None for one that is not."""
    return {package: _version(package) for package in packages}


def device_name(device_type: str) -> str:
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    try:
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    names = re.findall(r"model name\s*: (.+)", said)
    return names[0] if names else platform.machine()


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def copy_of(moved_bytes: int, device_type: str) -> Callable[[], torch.Tensor]:
    """A copy that reads and writes `moved_bytes` in all."""
    source, target = torch.ones(2, max(moved_bytes // 2, 1), dtype=torch.uint8, device=device_type)
    return lambda: target.copy_(source)


def copy_bandwidth(moved_bytes: int, device_type: str) -> float:
    """GB/s (bytes read and written) of a copy on the device."""
    clock, copy = Clock(device_type), copy_of(moved_bytes, device_type)
    copy()
    return moved_bytes / 1e3 / median(clock.sample(copy, 5) for _ in range(5))


def _said(*command: str) -> str | None:
    """What a command prints, or None where it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _power_and_driver() -> tuple[float | None, str | None]:
    said = _said("nvidia-smi", "--query-gpu=power.limit,driver_version", "--format=csv,noheader,nounits")
    if not said:
        return None, None
    power, driver = said.splitlines()[0].split(", ")
    return (float(power) if power.replace(".", "", 1).isdigit() else None), driver


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
