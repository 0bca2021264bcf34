"""The query, key and value of a self-attention, with or without an adapter, as one op with the gradient of their input.

As three layers, each would read the input, and write a gradient of it for autograd to add up, in kernels that read and
write all of it. Forward, one matrix product by all weights reads the input once; backward, the matrix products add up
by themselves. With an adapter (LoRA) the input is read once for the three low-rank projections, forward and backward.
There is no kernel besides the reference, because library GEMMs do all the work. M rows of x, I inputs, O outputs,
rank r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpo_fast.ops.backend import Op
from ddpo_fast.ops.operands import with_frozen

Three = tuple[Tensor, Tensor, Tensor]
NO_BIASES = (None, None, None)


def qkv_linear(x: Tensor, weights: Three, biases: Three | None = None, packed: bool = True) -> Three:
    """`x W^T + b` for three weights [O, I]: [..., I] -> three [..., O], in the dtype of x, which is the weights'.

    Args:
        biases: three [O], or None for 0.
        packed: whether the results may be parts of the rows of one matrix product.
    """
    return FORWARD(x, *weights, *(biases or NO_BIASES), *[None] * 6, 1.0, packed)[:3]


def lora_qkv_linear(
    x: Tensor,
    weights: Three,
    lora_a: Three,
    lora_b: Three,
    scaling: float,
    biases: Three | None = None,
    packed: bool = True,
) -> Three:
    """`x W^T + b + scaling (x A^T) B^T` for three frozen weights [O, I] with adapters A [r, I] and B [O, r].

    The dtypes are as for `lora_linear`, other arguments as for `qkv_linear`. Raises `ValueError` if a weight or a bias
    requires a gradient.
    """
    pairs = zip(weights, biases or NO_BIASES, strict=True)
    inputs, frozen, added = zip(*(with_frozen("lora_qkv_linear", x, *pair) for pair in pairs), strict=True)
    x = inputs[0]
    adapters = (factor.to(x.dtype) for factor in (*lora_a, *lora_b))
    return FORWARD(x, *frozen, *added, *adapters, scaling, packed)[:3]


def _forward(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    bias_q: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    a_q: Tensor | None,
    a_k: Tensor | None,
    a_v: Tensor | None,
    b_q: Tensor | None,
    b_k: Tensor | None,
    b_v: Tensor | None,
    scaling: float,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The three results and, with adapters, `x A^T` [M, 3 r]."""
    rows = x.reshape(-1, x.shape[-1])
    weights, biases = (w_q, w_k, w_v), (bias_q, bias_k, bias_v)
    sizes = list(map(len, weights))
    # Copying the weights costs less than reading the rows twice more if the images together have more rows than the
    # weights: from 6 images on. How many there are decides nothing, as memory is predicted from few of them.
    together = packed and 2 * x.shape[-2] >= max(sizes)
    found: list[Tensor] = []
    if together and bias_q is None:
        # with the first factors of adapters, for which the rows would be read again
        q, k, v, *found = _one_product(rows, weights, [a for a in (a_q, a_k, a_v) if a is not None])
    elif together:
        bias = torch.cat([bias for bias in biases if bias is not None])
        q, k, v = torch.addmm(bias, rows, torch.cat(weights).t()).split(sizes, dim=1)
    else:
        q, k, v = (_product(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    low = x.new_empty(0)
    if a_q is not None and a_k is not None and a_v is not None:
        assert b_q is not None
        assert b_k is not None
        assert b_v is not None
        low = found[0] if found else rows @ torch.cat([a_q, a_k, a_v]).t()
        parts = low.split([len(a_q), len(a_k), len(a_v)], dim=1)
        for result, part, b in zip((q, k, v), parts, (b_q, b_k, b_v), strict=True):
            result.addmm_(part, b.t(), alpha=scaling)
    q, k, v = (result.view(*x.shape[:-1], result.shape[-1]) for result in (q, k, v))
    return q, k, v, low


def _one_product(rows: Tensor, weights: Sequence[Tensor], lora_a: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows' products by three weights and, if there are any, by all of `lora_a` together, as parts of one.

    The rows of the result are padded to whole 16 bytes, as attention reads them.
    """
    sizes, ranks = list(map(len, weights)), sum(map(len, lora_a))
    if not lora_a:
        return (rows @ torch.cat(list(weights)).t()).split(sizes, dim=1)
    padding = -(sum(sizes) + ranks) % (16 // rows.element_size())
    stacked = torch.cat([*weights, *lora_a, weights[0][:padding]])
    return (rows @ stacked.t()).split([*sizes, ranks, len(stacked) - sum(sizes) - ranks], dim=1)[:-1]


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())


def _backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    low: Tensor,
    scaling: float,
    needs_x: bool,
    needs_weights: bool,
    needs_biases: bool,
) -> list[Tensor]:
    """The gradients of x, the weights and the biases that are needed, and of the adapters, if there are any and x.

    Those of the three A are one tensor, because results of a custom op must not share memory.
    """
    grads = [grad.reshape(-1, grad.shape[-1]) for grad in (grad_q, grad_k, grad_v)]
    found = []
    dx = grads[0] @ weights[0] if needs_x else grad_q.new_empty(0)
    if needs_x:
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            dx.addmm_(grad, weight)
        found.append(dx)
    rows = None if x is None else x.reshape(-1, x.shape[-1])
    if needs_weights:
        assert rows is not None
        found += [grad.t() @ rows for grad in grads]
    if needs_biases:
        found += [grad.sum(0) for grad in grads]
    if lora_a:
        stacked = torch.cat(list(lora_a))
        grad_low = torch.cat([grad @ b for grad, b in zip(grads, lora_b, strict=True)], dim=1)
        if needs_x:
            dx.addmm_(grad_low, stacked, alpha=scaling)
        if rows is None:
            return found
        # with beta=0 the first operand is not read: this is scaling * product in one launch
        found.append(torch.addmm(stacked, grad_low.t(), rows, beta=0, alpha=scaling))
        parts = low.split([len(a) for a in lora_a], dim=1)
        for grad, b, part in zip(grads, lora_b, parts, strict=True):
            found.append(torch.addmm(b, grad.t(), part, beta=0, alpha=scaling))
    return found


def _empty(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights, adapters = others[:3], others[6:9]
    q, k, v = (x.new_empty(*x.shape[:-1], len(weight)) for weight in weights)
    rank = 0 if adapters[0] is None else sum(map(len, adapters))
    return q, k, v, x.new_empty(x.shape[:-1].numel(), rank) if rank else x.new_empty(0)


FORWARD = Op("qkv_linear", _forward, _empty, shares_memory=True)
BACKWARD = Op("qkv_linear_backward", _backward, _backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *operands, ctx.scaling, _ = inputs
    low = output[-1]
    ctx.shape = x.shape
    ctx.mark_non_differentiable(low)
    # without this, autograd would allocate zeros for the gradient of `low` in every backward pass
    ctx.set_materialize_grads(False)
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if any(needs[1:4]) or any(needs[7:13]) else None, low, *operands[:3], *operands[6:])


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, low, *operands = ctx.saved_tensors
    weights, lora_a, lora_b = (operands[i : i + 3] for i in (0, 3, 6))
    needs = ctx.needs_input_grad
    of = needs[0], any(needs[1:4]), any(needs[4:7])
    whole = [
        weight.new_zeros(*ctx.shape[:-1], len(weight)) if grad is None else grad
        for grad, weight in zip(grads[:3], weights, strict=True)
    ]
    adapters = ([], []) if lora_a[0] is None else (lora_a, lora_b)
    found = iter(BACKWARD(*whole, x, weights, *adapters, low, ctx.scaling, *of))
    dx = next(found).view(ctx.shape) if needs[0] else None
    of_weights, of_biases = ([next(found) for _ in range(3)] if needed else [None] * 3 for needed in of[1:])
    of_adapters: list[Tensor | None] = [None] * 6
    if adapters[0] and x is not None:
        stacked = next(found)
        of_adapters = [*stacked.split([len(a) for a in lora_a]), *found]
    return dx, *of_weights, *of_biases, *of_adapters, None, None


FORWARD.register_autograd(_gradients, setup_context=_save)
