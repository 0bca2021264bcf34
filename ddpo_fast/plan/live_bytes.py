"""Counts the bytes of all tensors that exist after each op of a computation, on PyTorch's `meta` device.

A tensor on `meta` has a shape, strides and a dtype but no memory. Networks run there as usual, and autograd saves and
frees the same tensors at the same moments as on a GPU. So the peak of this count is the peak of the memory that the
computation would take, apart from workspaces that kernels allocate within an op.

Three things differ between `meta` and a real device, and are corrected here: which attention PyTorch chooses
(`fused_attention`), the memory layout of outputs (`_in_device_layout`), and this project's ops, which have no kernel on
`meta` (`_reference_without_kernel`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ddpo_fast.ops.backend import OPS, Op
from ddpo_fast.unet import FEW_SCORES, attend_to_few

# PyTorch's caching allocator rounds sizes up to multiples of this
CUDA_BLOCK = 512
# the widest head that flash attention has kernels for; PyTorch takes memory-efficient attention for wider ones
FLASH_HEAD_DIM = 256
HALF = (torch.float16, torch.bfloat16)


class LiveBytes(TorchDispatchMode):
    """A context that appends to `after_op`, after each op, the bytes of all storages that ops have made and not freed.

    One of this project's ops counts as a single op if it has a kernel for the device, because the kernel allocates only
    the outputs. An op without a kernel counts as the PyTorch ops of its reference implementation.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.after_op: list[int] = []
        self.now = 0
        # The storages that exist, by the address of the C++ object, because on `meta` all data pointers are zero.
        # Several tensors may be views of one storage.
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            # a storage from before the count began, such as a weight's, counts as 0 bytes, and so do later views of it
            self._count(tensor, 0)
        if (op := _reference_without_kernel(func, self.device_type)) is not None:
            # PyTorch switches a dispatch mode off while the mode handles an op, so it is entered again here
            with self:
                return op(*args)
        out = _in_device_layout(func, args, _called(func, args, kwargs or {}), self.device_type)
        for tensor in _tensors(out):
            self._count(tensor, tensor.untyped_storage().nbytes())
        self.after_op.append(self.now)
        return out

    def _count(self, tensor: torch.Tensor, size: int) -> None:
        """Counts the tensor's storage as `size` bytes until the storage is freed, unless it is counted already."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        if self.device_type == "cuda":
            size = -(-size // CUDA_BLOCK) * CUDA_BLOCK
        self._known.add(storage._cdata)
        self.now += size
        # PyTorch keeps a storage's Python object for as long as any tensor uses the storage, so the object's end is
        # that of the storage. At the exit of the interpreter nobody reads the count, so the callback need not run.
        weakref.finalize(storage, self._free, storage._cdata, size).atexit = False

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


# Of each op that makes new tensors: what it has returned for each kind of arguments, with tensors replaced by `_Kind`.
# On `meta` PyTorch computes the shapes of many ops in Python, a millisecond each, and a network of many equal blocks
# has the same few hundred kinds of calls ten thousand times.
_RETURNED: dict[tuple[Any, ...], Any] = {}


class _Kind(NamedTuple):
    """What the shape of an op's output depends on of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_conjugate: bool


def _called(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)` for tensors on `meta`, whose shapes are computed for the first of calls alike only."""
    if func is torch.ops.aten.addmm_.default:
        # of `ops/linear.py`; it changes values only
        return args[0]
    if not _makes_new_tensors(func):
        return func(*args, **kwargs)
    try:
        key = func, _kinds(args), tuple((name, _kinds(value)) for name, value in kwargs.items())
        known = _RETURNED.get(key)
    # an argument that cannot be compared, or a tensor with values
    except TypeError:
        return func(*args, **kwargs)
    if known is None:
        out = func(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        # `_unsafe_view` and a few others return a view and do not say so
        if all(tensor.is_meta and tensor.untyped_storage()._cdata not in given for tensor in _tensors(out)):
            _RETURNED[key] = _kinds(out)
        return out
    return _made(known)


@functools.cache
def _makes_new_tensors(func: Any) -> bool:
    """Whether an op writes to none of its arguments and returns no view of one."""
    schema = func._schema
    return not schema.is_mutable and all(value.alias_info is None for value in (*schema.returns, *schema.arguments))


def _kinds(value: Any) -> Any:
    """An argument or output with tensors replaced by their kinds, which can be compared and kept."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            raise TypeError("its values may matter")
        return _Kind(value.shape, value.stride(), value.dtype, value.is_conj())
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple, *map(_kinds, value))
    # 1, 1.0 and True are equal
    return type(value), value


def _made(kinds: Any) -> Any:
    """New tensors of the kinds of an output."""
    if isinstance(kinds, _Kind):
        return torch.empty_strided(kinds.shape, kinds.stride, dtype=kinds.dtype, device="meta")
    kind, *values = kinds
    return kind(map(_made, values)) if kind in (list, tuple) else values[0]


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, list | tuple | dict):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value)


def _in_device_layout(func: Any, args: Any, out: Any, device_type: str) -> Any:
    """The output of an op on `meta`, in the memory layout that it would have on the device.

    On a device, convolutions (and on a CPU group norms) of channels_last tensors return channels_last tensors. On
    `meta` they return contiguous ones. Later ops would then copy tensors to change their layout where they do not on
    the device, or the other way round.
    """
    aten = torch.ops.aten
    keep_layout = [aten.convolution.default, aten.convolution_backward.default]
    if device_type == "cpu":
        keep_layout += [aten.native_group_norm.default, aten.native_group_norm_backward.default]
    if func not in keep_layout or not any(_is_channels_last(arg) for arg in args[:3]):
        return out
    first, *others = out if isinstance(out, tuple) else (out,)
    if isinstance(first, torch.Tensor) and first.is_meta and first.ndim == 4:
        first = torch.empty_like(first, memory_format=torch.channels_last)
    return (first, *others) if isinstance(out, tuple) else first


def _is_channels_last(tensor: Any) -> bool:
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4:
        return False
    # PyTorch's own test is true for both layouts of a weight with a 1x1 kernel. Only the stride of the last dimension,
    # which has a single element, tells in which layout such a weight was made.
    return tensor.stride(1) == 1 and tensor.stride(3) >= tensor.shape[1] > 1


def _reference_without_kernel(func: Any, device_type: str) -> Callable[..., Any] | None:
    """The reference implementation of an op, if it is this project's and has no kernel on the device; else None."""
    namespace, _, name = func._schema.name.partition("::")
    op: Op | None = OPS.get(name) if namespace == "ddpo_fast" else None
    if op is None or (device_type == "cuda" and op.implementations["triton"] is not None):
        return None
    if device_type == "cpu" and op.backend("cpu", torch.float32) == "csrc":
        return None
    return op.implementations["reference"]


@dataclass(frozen=True)
class Trace:
    """Bytes of the tensors that exist after each op of a computation with R rows: `fixed + R * per_row`, [ops] each."""

    fixed: np.ndarray
    per_row: np.ndarray

    def peak(self, rows: float) -> int:
        """The peak for `rows` rows: the largest number of bytes after any op."""
        return int(np.ceil((self.fixed + rows * self.per_row).max()))


def trace(compute: Callable[[int], Any], device_type: str) -> Trace:
    """The trace of `compute(R)`, from a run with 2 rows and one with 4.

    Each tensor's size is a constant (a weight's gradient, for example) or proportional to R, so the bytes after each op
    are a linear function of R, which two points determine. The peak is not linear: for few rows the peak may come when
    most gradients exist, and for many rows when most activations do. So the functions of all ops are kept, and
    `Trace.peak` takes their maximum.

    A run with 1 row would not do: PyTorch ignores the stride of a dimension of size 1, so a tensor of one row counts as
    contiguous in more layouts, and copies that change a layout would be missing.
    """
    two, four = (_after_ops(compute, rows, device_type) for rows in (2, 4))
    assert len(two) == len(four), "the number of ops must not depend on the number of rows"
    per_row = (four - two) / 2
    return Trace(two - 2 * per_row, per_row)


def _after_ops(compute: Callable[[int], Any], rows: int, device_type: str) -> np.ndarray:
    with fused_attention(device_type), LiveBytes(device_type) as live:
        compute(rows)
    return np.array(live.after_op, dtype=np.float64)


@contextmanager
def fused_attention(device_type: str) -> Iterator[None]:
    """A context in which `scaled_dot_product_attention` runs the ops that PyTorch chooses on the device.

    These ops are fused and never store the whole matrix of scores. For tensors on `meta` PyTorch would choose its plain
    implementation, whose scores, [heads, H W, H W] for each row, would dominate the count.

    The function itself is replaced. A torch function mode would not be active when gradient checkpointing computes a
    block again in the backward pass.
    """

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = kwargs.get("attn_mask")
        # With dropout or fewer heads of keys PyTorch may choose other kernels, and a mask of booleans it converts
        # first. These networks use none of the three.
        is_boolean = mask is not None and not mask.is_floating_point()
        if args or is_boolean or any(kwargs.get(name) for name in ("dropout_p", "enable_gqa")):
            return plain(query, key, value, *args, **kwargs)
        return _attend(query, key, value, mask, bool(kwargs.get("is_causal")), device_type)

    plain = F.scaled_dot_product_attention
    with patch.object(F, "scaled_dot_product_attention", attend):
        yield


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    device_type: str,
) -> torch.Tensor:
    """Attention with a mask that is added to the scores, as T5's biases of positions are, or with causality, or plain.

    None of the fused ops copies the mask that all rows share.
    """
    aten = torch.ops.aten
    if device_type == "cpu":
        # unet/attention.py computes few scores in half precision without SDPA
        few = query.dtype in HALF and query.shape[-2] * key.shape[-2] <= FEW_SCORES
        if few and mask is None and not is_causal:
            return attend_to_few(query, key, value)
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, attn_mask=mask)[0]
    # flash attention on a GPU takes no mask
    if mask is None and query.dtype in HALF and query.shape[-1] <= FLASH_HEAD_DIM:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
    needs_sums = query.requires_grad
    return aten._scaled_dot_product_efficient_attention(query, key, value, mask, needs_sums, 0.0, is_causal)[0]
