"""What two runs are compared by: their trained weights, the lines of their metrics.jsonl, and data to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from run_process import read_records

Weights = dict[str, torch.Tensor]

# the values of metrics.jsonl that a clock or the system gives, and so no two runs share
TIMINGS = {"sample_s", "reward_s", "train_s", "images_per_s", "elapsed_s", "host_gb"}


def trained_weights(trainer: Any) -> Weights:
    """Copies of the UNet's trained weights by name, of one of our trainers or of TRL's."""
    return {n: p.detach().clone() for n, p in trainer.sd_pipeline.unet.named_parameters() if p.requires_grad}


def same_bits(one: Weights, two: Weights) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def distance(one: Weights, two: Weights) -> float:
    """The norm of the difference of two networks' weights, summed in fp64."""
    assert one.keys() == two.keys()
    return sum((one[name].double() - two[name].double()).square().sum().item() for name in one) ** 0.5


def relative_distance(weights: Weights, reference: Weights, start: Weights) -> float:
    """How far `weights` are from `reference`, as a share of how far training moved `reference` from `start`."""
    moved = distance(reference, start)
    assert moved > 0, "a run that trains nothing shows nothing"
    return distance(weights, reference) / moved


def changed_share(before: Weights, after: Weights) -> float:
    """The share of all elements that are not what they were."""
    changed = sum(int((before[name] != after[name]).sum()) for name in before)
    return changed / sum(weight.numel() for weight in before.values())


def metrics_of(run: Any, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, or those of one kind: "epoch" or "update".

    Args:
        run: the run's folder, or its trainer.
    """
    folder = run if isinstance(run, Path) else run.output_dir
    return [record for record in read_records(folder / "metrics.jsonl") if kind in (None, record["kind"])]


def without_timings(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in TIMINGS}


def as_bytes(value: Any) -> Any:
    """Nested data with each tensor replaced by its dtype, shape and bytes, which `==` compares."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: as_bytes(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_bytes(item) for item in value]
    return value
