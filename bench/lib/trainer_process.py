"""Runs a trainer in a process of its own, by `run_trainer.py`, and returns the figures that the process prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lib import python_path
from lib.command_line import print_progress
from lib.workloads import Contender

Figures = dict[str, Any]


class RunFailed(RuntimeError):
    pass


def run_spec(
    contender: Contender, model: Path, prompts: list[str], warmup: int, epochs: int, profiled: bool = False
) -> dict[str, Any]:
    """What `run_trainer.py` is told: `warmup` epochs that are not counted, then `epochs` that are."""
    return {
        "trainer": contender.trainer,
        "model": str(model),
        "use_lora": contender.use_lora,
        "settings": contender.settings,
        "prompts": prompts,
        "warmup": warmup,
        "epochs": epochs,
        "profiled": profiled,
    }


def run_in_process(spec: dict[str, Any], device: str, timeout_s: float | None = None) -> Figures:
    """Raises `RunFailed` with the reason if the run ends without figures or takes longer than `timeout_s`."""
    command = [sys.executable, "-m", "lib.run_trainer", json.dumps(spec)]
    try:
        done = subprocess.run(command, env=environment(device), capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"stopped after {timeout_s:.0f} s") from None
    if done.returncode:
        lines = (done.stderr.strip() or f"status {done.returncode}").splitlines()
        print_progress("\n".join(lines[-15:]))
        raise RunFailed(lines[-1][:300])
    return json.loads(done.stdout.splitlines()[-1])


def environment(device: str) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    hidden = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}
    # interpreted kernels take thousands of times as long
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # idle OpenMP threads sleep instead of spinning, as in `make demo`; the user's own setting overrides this
    default = {"OMP_WAIT_POLICY": "PASSIVE"}
    return default | inherited | offline | hidden | {"PYTHONPATH": python_path()}
