"""The bytes of all tensors that are alive, op by op, of networks without values (on the `meta` device).

R rows of a UNet, or images.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ddpo_fast.ops.backend import OPS, Op
from ddpo_fast.unet import FEW_SCORES, attend_to_few

# what PyTorch's caching allocator rounds up to
CUDA_BLOCK = 512
# flash attention has kernels up to here, memory-efficient attention beyond
FLASH_HEAD_DIM = 256
HALF = (torch.float16, torch.bfloat16)


class LiveBytes(TorchDispatchMode):
    """Inside of it, `after_op` grows by the bytes of the storages that ops have made and nobody has freed.

    An op of ours with a kernel for the device counts as one op, as its outputs are all that it allocates; of others
    the ops that they consist of count.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.after_op: list[int] = []
        self.now = 0
        # by the address of the C++ object, as meta tensors have no data
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            # made before: a view of it is nothing new
            self._note(tensor, 0)
        if (op := _consists_of_others(func, self.device_type)) is not None:
            with self:
                return op(*args)
        out = _laid_out(func, args, func(*args, **(kwargs or {})), self.device_type)
        for tensor in _tensors(out):
            self._note(tensor, tensor.untyped_storage().nbytes())
        self.after_op.append(self.now)
        return out

    def _note(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        if self.device_type == "cuda":
            size = -(-size // CUDA_BLOCK) * CUDA_BLOCK
        self._known.add(storage._cdata)
        self.now += size
        weakref.finalize(storage, self._forget, storage._cdata, size).atexit = False

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))


def _laid_out(func: Any, args: Any, out: Any, device_type: str) -> Any:
    """The output of an op on `meta` in the layout that it has on the device: there, convolutions keep to channels_last
    (on a CPU norms too), and a copy from one layout to the other would otherwise be missed."""
    aten = torch.ops.aten
    keeping = [aten.convolution.default, aten.convolution_backward.default]
    if device_type == "cpu":
        keeping += [aten.native_group_norm.default, aten.native_group_norm_backward.default]
    if func not in keeping or not any(_is_channels_last(arg) for arg in args[:3]):
        return out
    first, *others = out if isinstance(out, tuple) else (out,)
    if isinstance(first, torch.Tensor) and first.is_meta and first.ndim == 4:
        first = torch.empty_like(first, memory_format=torch.channels_last)
    return (first, *others) if isinstance(out, tuple) else first


def _is_channels_last(tensor: Any) -> bool:
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4:
        return False
    # by its strides: a 1x1 kernel is contiguous in both layouts
    return tensor.stride(1) == 1 and tensor.stride(3) >= tensor.shape[1] > 1


def _consists_of_others(func: Any, device_type: str) -> Callable[..., Any] | None:
    """The reference of an op of ours that has no kernel on the device."""
    namespace, _, name = func._schema.name.partition("::")
    op: Op | None = OPS.get(name) if namespace == "ddpo_fast" else None
    if op is None or (device_type == "cuda" and op.implementations["triton"] is not None):
        return None
    return op.implementations["reference"]


@dataclass(frozen=True)
class Trace:
    """Live bytes after each op of one computation as a function of R: `fixed + R * per_row`."""

    fixed: np.ndarray
    per_row: np.ndarray

    def peak(self, rows: float) -> int:
        """The most bytes at a time."""
        return int(np.ceil((self.fixed + rows * self.per_row).max()))


def trace(compute: Callable[[int], Any], device_type: str) -> Trace:
    """The trace of `compute(R)`, from its runs with 2 and with 4 rows.

    Tensors of one row pass for being laid out in ways that others are not. Each op's bytes are linear in the rows, so
    the largest of them may be another op's for more rows, and is still found.
    """
    two, four = (_after_ops(compute, rows, device_type) for rows in (2, 4))
    assert len(two) == len(four), "as many ops whatever the number of rows"
    per_row = (four - two) / 2
    return Trace(two - 2 * per_row, per_row)


def _after_ops(compute: Callable[[int], Any], rows: int, device_type: str) -> np.ndarray:
    with fused_attention(device_type), LiveBytes(device_type) as live:
        compute(rows)
    return np.array(live.after_op, dtype=np.float64)


@contextmanager
def fused_attention(device_type: str) -> Iterator[None]:
    """Attention as the device has it, which keeps no scores: for tensors on `meta` PyTorch would choose that which
    does. A torch function mode would not reach what a backward pass computes again."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or any(kwargs.get(name) for name in ("is_causal", "dropout_p")) or kwargs.get("attn_mask") is not None:
            return plain(query, key, value, *args, **kwargs)
        return _attend(query, key, value, device_type)

    plain = F.scaled_dot_product_attention
    with patch.object(F, "scaled_dot_product_attention", attend):
        yield


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, device_type: str) -> torch.Tensor:
    aten = torch.ops.aten
    if device_type == "cpu":
        if query.dtype in HALF and query.shape[-2] * key.shape[-2] <= FEW_SCORES:
            return attend_to_few(query, key, value)
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    if query.dtype in HALF and query.shape[-1] <= FLASH_HEAD_DIM:
        return aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return aten._scaled_dot_product_efficient_attention(query, key, value, None, query.requires_grad)[0]
