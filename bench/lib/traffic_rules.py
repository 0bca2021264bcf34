"""What each PyTorch op launches on a GPU: the kernels, and the bytes that each of them reads and writes.

`RULES` is the table. An op without a row that is elementwise launches one kernel, which reads its operands and writes
its result; views launch none; for any other op `launches_of` raises. In every launch each distinct byte of an operand
counts once: where a kernel passes over its own slab twice, as in our group norm, the second pass is served by caches.
Not counted: what cuDNN converts inside of a call, the workspace of split sums, and kernels of under a kilobyte that a
library adds to set itself up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

KINDS = ("matmul", "conv", "attention", "norm", "activation", "add", "bias", "copy", "cast")
aten = torch.ops.aten
FLOAT = 4


class Launch(NamedTuple):
    """A kernel: one of `KINDS`, its bytes read and written, and its FLOPs (two for a multiply-add)."""

    kind: str
    read: int
    written: int
    flops: float = 0.0


# yields the launches of an op from its result and its arguments
Rule = Callable[..., Iterator[Launch]]


def bytes_of(*tensors: Tensor | None) -> int:
    """Distinct bytes: an expanded dimension counts once."""
    total = 0
    for tensor in tensors:
        if tensor is not None:
            distinct = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0)
            total += tensor.element_size() * math.prod(distinct)
    return total


def launches_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Launch]:
    """The launches of an op that returned `out`. Raises `NotImplementedError` for an op that no rule covers."""
    if (rule := RULES.get(func.overloadpacket)) is not None:
        return list(rule(out, *args, **kwargs))
    if func.overloadpacket in FREE or any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
        return []
    if torch.Tag.pointwise in func.tags:
        given = [*args, *kwargs.values()]
        return [Launch(kind_of_elementwise(func, given), bytes_of(*tensors_in(given)), bytes_of(*tensors_in([out])))]
    raise NotImplementedError(f"bench/lib/traffic_rules.py has no rule for {func}: add one to RULES")


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values, and in lists and tuples among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def kind_of_elementwise(func: Any, args: list[Any]) -> str:
    """'add' for the sum of two tensors of one size, 'bias' if one of them is repeated, else 'activation'."""
    operands = tensors_in(args)
    if func.overloadpacket not in (aten.add, aten.add_, aten.sub) or len(operands) < 2:
        return "activation"
    return "add" if operands[0].shape == operands[1].shape else "bias"


# rules


def writes(kind: str) -> Rule:
    """One launch that reads nothing."""

    def rule(out: Tensor, *args: Any, **kwargs: Any) -> Iterator[Launch]:
        yield Launch(kind, 0, bytes_of(out))

    return rule


def one_launch(kind: str) -> Rule:
    """One launch that reads all operands and writes the results."""

    def rule(out: Any, *args: Any, **kwargs: Any) -> Iterator[Launch]:
        yield Launch(kind, bytes_of(*tensors_in(args)), bytes_of(*tensors_in([out])))

    return rule


def copy(out: Tensor, *args: Any, **kwargs: Any) -> Iterator[Launch]:
    """`copy_(to, from)` and ops that copy their first argument: a cast if the dtype changes."""
    source = tensors_in(args)[-1]
    yield Launch("copy" if source.dtype == out.dtype else "cast", bytes_of(source), bytes_of(out))


def part_backward(out: Tensor, grad: Tensor, *args: Any) -> Iterator[Launch]:
    """The gradient of a slice: zeros, into which the gradient is copied."""
    yield Launch("copy", 0, bytes_of(out))
    yield Launch("copy", bytes_of(grad), bytes_of(grad))


def product(out: Tensor, a: Tensor, b: Tensor, *args: Any) -> Iterator[Launch]:
    yield Launch("matmul", bytes_of(a, b), bytes_of(out), 2.0 * out.numel() * a.shape[-1])


def added_product(
    out: Tensor, added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> Iterator[Launch]:
    """cuBLASLt adds a bias row in the product's kernel; a matrix is first copied into the result, which is then read.
    In place, or with beta 0, nothing is copied."""
    flops = 2.0 * out.numel() * a.shape[1]
    if beta and added.ndim == 2 and added is not out:
        yield Launch("copy", bytes_of(added), bytes_of(out))
    yield Launch("matmul", bytes_of(a, b) + (bytes_of(added) if beta else 0), bytes_of(out), flops)


def convolution(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Iterator[Launch]:
    """Operands in another memory format than the result's are copied; PyTorch adds the bias in a kernel of its own."""
    yield from converted(out, x, weight)
    flops = flop_registry[aten.convolution](x, weight, bias, *args, out_val=out)
    yield Launch("conv", bytes_of(x, weight), bytes_of(out), flops)
    if bias is not None:
        yield Launch("bias", bytes_of(out, bias), bytes_of(out))


def convolution_backward(
    out: tuple[Tensor | None, ...], grad: Tensor, x: Tensor, weight: Tensor, sizes: Any, *args: Any
) -> Iterator[Launch]:
    """A kernel for each gradient: of the input, of the weight, and of the bias, a sum."""
    dx, dweight, dbias = out
    like = dx if dx is not None else weight
    yield from converted(like, grad, *([x] if dweight is not None else []), *([weight] if dx is not None else []))
    flops = 2.0 * grad.numel() * weight.numel() / weight.shape[0]
    if dx is not None:
        yield Launch("conv", bytes_of(grad, weight), bytes_of(dx), flops)
    if dweight is not None:
        yield Launch("conv", bytes_of(grad, x), bytes_of(dweight), flops)
    if dbias is not None:
        yield Launch("bias", bytes_of(grad), bytes_of(dbias))


def converted(like: Tensor, *operands: Tensor) -> Iterator[Launch]:
    """A copy of every operand that has not the memory format of `like`."""
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    wanted = torch.channels_last if last else torch.contiguous_format
    for operand in operands:
        if not operand.is_contiguous(memory_format=wanted):
            yield Launch("copy", bytes_of(operand), bytes_of(operand))


def attention(out: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Iterator[Launch]:
    attended, logsumexp = out[:2]
    # scores, and their product with the values
    flops = 4.0 * query.numel() * key.shape[-2]
    yield Launch("attention", bytes_of(query, key, value), bytes_of(attended, logsumexp), flops)


def attention_backward(
    out: tuple[Tensor, ...],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    logsumexp: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Iterator[Launch]:
    """FlashAttention-2's: row sums of grad * output; the gradients, of the query in fp32; and its conversion."""
    sums, wide = FLOAT * logsumexp.numel(), FLOAT * query.numel()
    yield Launch("attention", bytes_of(grad, attended), sums)
    # five products, as the scores are computed again
    flops = 10.0 * query.numel() * key.shape[-2]
    read = bytes_of(grad, query, key, value, logsumexp) + sums
    yield Launch("attention", read, wide + bytes_of(*out[1:3]), flops)
    yield Launch("attention", wide, bytes_of(out[0]))


def group_norm(out: tuple[Tensor, ...], x: Tensor, *args: Any) -> Iterator[Launch]:
    """PyTorch's: the statistics; scale and shift of each channel [N, C] in fp32; and their use."""
    y, mean, rstd = out
    scales = 2 * FLOAT * x.shape[0] * x.shape[1]
    yield Launch("norm", bytes_of(x), bytes_of(mean, rstd))
    yield Launch("norm", bytes_of(mean, rstd, *tensors_in(args)), scales)
    yield Launch("norm", bytes_of(x) + scales, bytes_of(y))


def group_norm_backward(out: tuple[Tensor | None, ...], grad: Tensor, x: Tensor, *args: Any) -> Iterator[Launch]:
    """PyTorch's: two sums a channel; three factors a channel in two kernels; dx; the weight's and bias's gradients."""
    dx, dweight, dbias = out
    channels = FLOAT * x.shape[0] * x.shape[1]
    yield Launch("norm", bytes_of(grad, x), 2 * channels)
    if dx is not None:
        yield Launch("norm", 0, channels)
        yield Launch("norm", 2 * channels, 2 * channels)
        yield Launch("norm", bytes_of(grad, x) + 3 * channels, bytes_of(dx))
    if dweight is not None:
        yield Launch("norm", 2 * channels, bytes_of(dweight, dbias))


def layer_norm_backward(out: tuple[Tensor | None, ...], grad: Tensor, x: Tensor, *args: Any) -> Iterator[Launch]:
    """PyTorch's: dx, then the gradients of weight and bias."""
    dx, dweight, dbias = out
    if dx is not None:
        yield Launch("norm", bytes_of(grad, x), bytes_of(dx))
    if dweight is not None or dbias is not None:
        yield Launch("norm", bytes_of(grad, x), bytes_of(dweight, dbias))


def fused_group_norm_backward(out: list[Tensor], x: Tensor, *args: Any) -> Iterator[Launch]:
    """Ours: one kernel, which also adds up the images' gradients of vectors that are the same for all of them."""
    addend, width, (affine, of_addend, later) = args[4], *args[-2:]
    shared = of_addend and len(addend) != len(x)
    # of a concatenation, dx is two tensors
    parts = FLOAT * len(x) * out[2 if width else 1].numel() if affine or shared or later else 0
    yield with_parts("norm", [x, *tensors_in(args)], out, parts)


def geglu_backward(out: list[Tensor], grad: Tensor, x: Tensor, bias: Tensor | None, *args: Any) -> Iterator[Launch]:
    """Ours: one kernel, whose about 1056 programs take 256 columns each and add up parts of the bias's gradient."""
    parts = FLOAT * x.shape[-1] * max(1, 1056 * 256 // grad.shape[-1]) if len(out) > 1 else 0
    yield with_parts("activation", tensors_in([grad, x, bias]), out, parts)


def add_layernorm_backward(out: list[Tensor], grad: Tensor, *args: Any) -> Iterator[Launch]:
    """Ours: one kernel, whose 528 programs add up parts of the vectors' gradients."""
    vectors = out[-1] if any(args[-1]) else None
    parts = 0 if vectors is None else FLOAT * 528 * vectors.shape[0] * vectors.shape[-1]
    yield with_parts("norm", [grad, *tensors_in(args)], out, parts)


def with_parts(kind: str, read: list[Tensor], written: list[Tensor], parts: int) -> Launch:
    """A launch that also writes and reads bytes of `parts` of sums."""
    return Launch(kind, bytes_of(*read) + parts, bytes_of(*written) + parts)


# PyTorch's RMS norm on a GPU: its own op is composed of others on the device `meta`


@torch.library.custom_op("traffic::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("traffic::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, affine: bool) -> list[Tensor]:
    raise NotImplementedError


@rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, affine: bool) -> list[Tensor]:
    return [torch.empty_like(x), *([torch.empty_like(weight)] if affine else [])]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, grad: Tensor, *unused: None) -> Any:
    affine = ctx.needs_input_grad[1]
    dx, *dweight = torch.ops.traffic.rms_norm_backward(grad, *ctx.saved_tensors, affine)
    return (dx, *(dweight or [None]))


rms_norm.register_autograd(_differentiate, setup_context=_save)


def fused_rms_norm_backward(out: list[Tensor], grad: Tensor, x: Tensor, *args: Any) -> Iterator[Launch]:
    """As of the layer norm: dx, then the weight's gradient."""
    dx, *dweight = out
    yield Launch("norm", bytes_of(grad, x, *tensors_in(args)), bytes_of(dx))
    if dweight:
        yield Launch("norm", bytes_of(grad, x), bytes_of(*dweight))


# ops that only allocate, or whose result is their argument
FREE = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided),
    *(aten._unsafe_view, aten.detach, aten.lift_fresh),
}

RULES: dict[Any, Rule] = {
    aten.mm: product,
    aten.bmm: product,
    aten.addmm: added_product,
    aten.addmm_: added_product,
    aten.convolution: convolution,
    aten.convolution_backward: convolution_backward,
    aten._scaled_dot_product_flash_attention: attention,
    aten._scaled_dot_product_flash_attention_backward: attention_backward,
    aten.native_group_norm: group_norm,
    aten.native_group_norm_backward: group_norm_backward,
    aten.native_layer_norm: one_launch("norm"),
    aten.native_layer_norm_backward: layer_norm_backward,
    torch.ops.traffic.rms_norm: one_launch("norm"),
    torch.ops.traffic.rms_norm_backward: fused_rms_norm_backward,
    aten.mean: one_launch("norm"),
    # sums of gradients, of a bias or of a tensor that was added to many
    aten.sum: one_launch("bias"),
    aten.cat: one_launch("copy"),
    aten.stack: one_launch("copy"),
    aten.clone: copy,
    aten._to_copy: copy,
    aten.copy_: copy,
    aten.repeat: copy,
    aten.upsample_nearest2d: one_launch("copy"),
    aten.upsample_nearest2d_backward: one_launch("copy"),
    aten.slice_backward: part_backward,
    aten.select_backward: part_backward,
    **dict.fromkeys((aten.zeros, aten.zeros_like, aten.ones_like, aten.full, aten.fill_, aten.zero_), writes("copy")),
    aten.arange: writes("copy"),
}
# of this project's ops that have a Triton kernel, by name; the others launch what their definitions do
OWN_RULES: dict[str, Rule] = {
    "groupnorm_silu": one_launch("norm"),
    "groupnorm_silu_backward": fused_group_norm_backward,
    "add_layernorm": one_launch("norm"),
    "add_layernorm_backward": add_layernorm_backward,
    "geglu": one_launch("activation"),
    "geglu_backward": geglu_backward,
}
