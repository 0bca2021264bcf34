"""Other values for parameters or buffers while a block of code runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def temporary_values(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, each tensor's `.data` is the value of the same index; afterwards it is what it was before.

    Nothing is copied: the tensors point to other memory for a while. Whatever is written to `values` inside stays in
    them, and the tensors' own memory is not touched.
    """
    originals = [tensor.data for tensor in tensors]
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data = value
    try:
        yield
    finally:
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.data = original
