"""Groups of images of one drawn prompt: which have no spread of rewards, and their replacement by others.

A batch here is `[images, prompts, metadata, rewards, reward metadata]` of B consecutive images of a process, as the
trainer has them, and a group is K consecutive images, which may lie in several batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ddpo_fast.trajectory import Trajectory


class ScoredImages(NamedTuple):
    """Sampled and scored images of a process."""

    trajectory: Trajectory
    batches: list[list[Any]]

    @property
    def number(self) -> int:
        """How many images."""
        return len(self.trajectory.prompts)

    def has_spread(self, size: int) -> np.ndarray:
        """Which groups of `size` images have rewards that differ, bool; a cut group at the end is left out.

        Waits for the device.
        """
        rewards = torch.cat([batch[3] for batch in self.batches]).cpu().numpy()
        groups = rewards[: len(rewards) // size * size].reshape(-1, size)
        return np.ptp(groups, axis=1) > 0

    def with_groups_of(self, other: ScoredImages, size: int) -> ScoredImages:
        """A copy in which groups without spread are replaced by those with spread of `other`, as far as these go."""
        flat, useful = np.flatnonzero(~self.has_spread(size)), np.flatnonzero(other.has_spread(size))
        count = min(len(flat), len(useful))
        rows, sources = (
            (groups[:count, None] * size + np.arange(size)).reshape(-1).tolist() for groups in (flat, useful)
        )
        if not rows:
            return self
        batches = _with_images(self.batches, rows, other.batches, sources)
        return ScoredImages(self.trajectory.with_images(rows, other.trajectory, sources), batches)


def _with_images(
    batches: list[list[Any]], rows: Sequence[int], others: list[list[Any]], sources: Sequence[int]
) -> list[list[Any]]:
    """Copies of the batches whose images `rows`, counted over all batches, are the images `sources` of the others."""
    found = [list(batch) for batch in batches]
    # (batch, image in it) of each image
    places, other_places = (
        [(at, i) for at, batch in enumerate(given) for i in range(len(batch[1]))] for given in (batches, others)
    )
    changed = sorted({places[row][0] for row in rows})
    for at in changed:
        found[at] = [_copied(part, len(batches[at][1])) for part in batches[at]]
    for row, source in zip(rows, sources, strict=True):
        (at, i), (other_at, j) = places[row], other_places[source]
        for part, other in zip(found[at], others[other_at], strict=True):
            _put(part, i, other, j)
    for at in changed:
        # as the trainer made them
        found[at][1:3] = map(tuple, found[at][1:3])
    return found


def _copied(part: Any, count: int) -> Any:
    """A copy that `_put` can change: tensors, arrays and sequences of `count` items, and dicts of them."""
    if isinstance(part, dict):
        return {key: _copied(value, count) for key, value in part.items()}
    if isinstance(part, (torch.Tensor, np.ndarray)):
        return part.clone() if isinstance(part, torch.Tensor) else part.copy()
    return list(part) if isinstance(part, (list, tuple)) and len(part) == count else part


def _put(part: Any, i: int, other: Any, j: int) -> None:
    """Puts item j of `other` in place i of `part`; leaves alone what is not one item for each image."""
    if isinstance(part, dict) and isinstance(other, dict):
        for key in part.keys() & other.keys():
            _put(part[key], i, other[key], j)
    elif isinstance(part, _PER_IMAGE) and isinstance(other, (tuple, *_PER_IMAGE)) and i < len(part) and j < len(other):
        part[i] = other[j]


_PER_IMAGE = (list, torch.Tensor, np.ndarray)
