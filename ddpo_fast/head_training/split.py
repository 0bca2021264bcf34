"""Training and validation rows that share no image and no caption.

Rows that share something are one group, and a group is wholly on one side: else a head is measured on what it has seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def groups_of(rows: Sequence[Sequence[str]]) -> np.ndarray:
    """A group number for each row, [N]: rows that share one of their keys, or are linked by rows that do, have one."""
    parents = list(range(len(rows)))

    def root(row: int) -> int:
        while parents[row] != row:
            # every second step is shortened, so that chains stay short
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    first_with: dict[str, int] = {}
    for row, keys in enumerate(rows):
        for key in keys:
            parents[root(row)] = root(first_with.setdefault(key, row))
    return np.unique([root(row) for row in range(len(rows))], return_inverse=True)[1]


def validation_rows(groups: np.ndarray, keys: Sequence[Sequence[str]], share: float, seed: int) -> np.ndarray:
    """Which rows are for validation, [N] of bool: about a `share` of them, in whole groups.

    A group's place in the order of choice is a digest of the seed and its keys, so the order of rows does not matter.
    Raises `ValueError` if all rows are one group.
    """
    order: dict[int, str] = {}
    for group, row in zip(groups.tolist(), keys, strict=True):
        least = hashlib.sha256(f"{seed} {min(row)}".encode()).hexdigest()
        order[group] = min(least, order.get(group, least))
    if len(order) < 2:
        raise ValueError("all rows share images or captions with each other, so that none is left for validation")
    sizes = np.bincount(groups)
    chosen, count, target = set[int](), 0, share * len(groups)
    for group in sorted(order, key=order.__getitem__):
        if count + sizes[group] <= target:
            chosen.add(group)
            count += sizes[group]
    # every group is larger than the share: the smallest one is nearest to it
    return np.isin(groups, list(chosen or {int(sizes.argmin())}))
