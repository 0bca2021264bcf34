"""What a run measured rather than was told: kept with it, so that a resumed one computes alike, to the bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import psutil
import torch

T = TypeVar("T", int, float, str)

# settings that change neither what fits into memory nor what is fast, and that a resumed run may change
HARMLESS = {
    *("num_epochs", "save_freq", "num_checkpoint_limit", "resume_from", "output_dir", "logdir", "exp_name", "run_name"),
    *("log_with", "tracker_kwargs", "tracker_project_name", "project_kwargs", "push_to_hub", "train_learning_rate"),
}


class Measured(dict[str, int | float | str]):
    """Plain values by name, each measured once in the life of a run: sizes from free memory, the fastest kernel.

    A checkpoint and `config.json` keep them; the run that is resumed starts with them.
    """

    def once(self, name: str, measure: Callable[[], T]) -> T:
        """The value under `name`; `measure()`, on which all processes must agree, if there is none yet."""
        if name not in self:
            self[name] = measure()
        return self[name]  # type: ignore[return-value]

    def keep_threads(self) -> None:
        """Takes as many threads as the run began with, unless the environment says how many: a CPU splits sums."""
        if "OMP_NUM_THREADS" not in os.environ:
            threads = self.once("threads", torch.get_num_threads)
            if threads != torch.get_num_threads():
                torch.set_num_threads(threads)

    @classmethod
    def of_run(cls, state: Mapping[str, Any], settings: Mapping[str, Any]) -> Measured:
        """What the run that left `state` in a checkpoint has measured; nothing if `settings`, which name the device
        too, are others than its own, as its values may then not fit."""
        mine = json.loads(json.dumps(settings, default=str))
        same = all(_without_harmless(state.get(name)) == _without_harmless(mine[name]) for name in mine)
        return cls(state.get("measured", {}) if same else {})


def _without_harmless(value: Any) -> Any:
    return {n: v for n, v in value.items() if n not in HARMLESS} if isinstance(value, dict) else value


def device_name(device: torch.device) -> str:
    """A device of the same name has the same memory and computes as fast."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()}, {psutil.virtual_memory().total // 2**30} GiB)"
