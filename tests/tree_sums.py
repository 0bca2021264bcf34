"""Sums of interpreted Triton kernels in the order of a tree, as a GPU's threads and warps add them up.

The interpreter takes NumPy's sum. Along the last dimension that is a tree, but the rows of a tile are added up one
after the other: the error then grows with their number, that of a tree with its logarithm.
"""

from __future__ import annotations

from typing import Any


def add_up_as_trees() -> None:
    """Changes the interpreter for as long as this process lives."""
    from triton.runtime.interpreter import ReduceOps

    numpy_sum = ReduceOps.sum

    def add_up(self: Any, input: Any) -> Any:
        rows = input.handle.data
        if self.axis != 0 or rows.ndim == 1 or self.keep_dims:
            return numpy_sum(self, input)
        # the sizes of a tile are powers of two
        while len(rows) > 1:
            rows = rows[: len(rows) // 2] + rows[len(rows) // 2 :]
        return self.to_tensor(rows[0], input.dtype)

    ReduceOps.sum = add_up
