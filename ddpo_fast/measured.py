"""Values that a run measures, unlike its settings; they are saved so that a resumed run computes the same bits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import psutil
import torch

T = TypeVar("T", int, float, str)

# Settings that a resumed run may change without measuring anew: they decide neither what fits into memory nor what is
# fast.
HARMLESS = {
    *("num_epochs", "save_freq", "num_checkpoint_limit", "resume_from", "output_dir", "logdir", "exp_name", "run_name"),
    *("log_with", "tracker_kwargs", "tracker_project_name", "project_kwargs", "push_to_hub", "train_learning_rate"),
    *(
        "eval_freq",
        "eval_num_images",
        "sample_freq",
        "sample_num_images",
        "hub_model_id",
        "hub_private",
        "kohya_lora",
        "export",
        "keep_best_checkpoint",
        "early_stopping_patience",
        "keep_checkpoint_every",
    ),
}


class Measured(dict[str, int | float | str]):
    """Plain values by name, each measured once in the life of a run: batch sizes from free memory, the fastest kernel.

    Checkpoints and `config.json` record them, and a resumed run starts with them.
    """

    def measure_once(self, name: str, measure: Callable[[], T]) -> T:
        """The value called `name`; if there is none yet, `measure()`, which must give the same on every process."""
        if name not in self:
            self[name] = measure()
        return self[name]  # type: ignore[return-value]

    def keep_threads(self, choose: Callable[[], int]) -> None:
        """Uses as many CPU threads as the run began with, which is `choose()`, unless OMP_NUM_THREADS is set.

        Sums are split over the threads, so their bits depend on how many there are.
        """
        if "OMP_NUM_THREADS" not in os.environ:
            threads = self.measure_once("threads", choose)
            if threads != torch.get_num_threads():
                torch.set_num_threads(threads)

    @classmethod
    def of_run(cls, state: Mapping[str, Any], settings: Mapping[str, Any]) -> Measured:
        """The values that a checkpoint's `state` records.

        None of them if the present `settings`, among them the device, differ from the recorded ones: the values may not
        suit these.
        """
        # the state was read from JSON, where tuples are lists
        mine = json.loads(json.dumps(settings, default=str))
        same = all(_without_harmless(state.get(name)) == _without_harmless(mine[name]) for name in mine)
        return cls(state.get("measured", {}) if same else {})


def _without_harmless(value: Any) -> Any:
    """A mapping without the settings in `HARMLESS`; any other value as it is."""
    return {n: v for n, v in value.items() if n not in HARMLESS} if isinstance(value, dict) else value


def device_name(device: torch.device) -> str:
    """A device's name. Devices of the same name are taken to have the same memory and speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()}, {psutil.virtual_memory().total // 2**30} GiB)"
