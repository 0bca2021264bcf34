"""The sum of a residual and a layer's output, and the LayerNorm of the sum, as one op with two results.

As two ops, the norm would read the sum again, and the backward pass would add the gradients of the sum's two uses in a
kernel of its own. N images, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpo_fast.ops.backend import Op
from ddpo_fast.ops.operands import mark_outputs, returned_sums_gradient, stores_sum, widest

# of the adapter of a layer before a sum: each rank is a multiplication of every element of the rows
MOST_RANK = 16


def add_layernorm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: Tensor | None = None,
    added: Tensor | None = None,
    gate: Tensor | None = None,
    later: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`s = residual + gate * (x + added + factor low up^T)` and `y = (s - mean) / sqrt(var + eps) * scale + shift`.

    Returns (s, y).

    Args:
        x: [N, ..., D] fp16, bf16 or fp32 (fp64: by the reference). `mean` and `var` of each row of s are computed in
            fp32.
        scale, shift: [D], or [N, D] for each image its own (AdaLN; `scale` with the 1 that is added to it).
        residual: like `x`. Without it s is `x`, and `gate` must be None.
        added: [D], the bias of the layer that made `x`; its gradient is summed here. If there is a residual, the layer
            must not have added it, else it must have (detached, so that its gradient is not computed there too).
        gate: [N, D]; without it 1.
        later: [D], the bias of a layer whose output will be added to s. With it, s + later is returned in place of s,
            as rows [M, D] that nothing else reads, so that a matrix product may add to them in place.
        low, up: [N, ..., r] and [D, r] in the dtype of `x`, the last factors of an adapter of the layer that made `x`,
            without a gate; r is at most `MOST_RANK`. Without them 0 is added.

    Returns s and y in the dtype of `x`, dense. Saved for the backward pass are s, with a gate `x`, and the rows'
    statistics; without gradients, s is not stored if `later` is given. The gradient of s, from its other uses, is added
    in the kernel of the backward pass, which also sums it for that of `later`. Raises `ValueError` for shapes that do
    not fit.
    """
    images, width = x.shape[:1], x.shape[-1:]
    if scale.shape not in (width, images + width) or shift.shape != scale.shape:
        raise ValueError(
            f"scale and shift have shapes {tuple(scale.shape)} and {tuple(shift.shape)}, x {tuple(x.shape)}"
        )
    if residual is None and gate is not None:
        raise ValueError("a gate belongs to a sum, but there is no residual")
    assert low is None or (up is not None and residual is not None and gate is None)
    fits: dict[str, tuple[Tensor | None, Any]] = {"residual": (residual, x.shape), "gate": (gate, images + width)}
    fits |= {"added": (added, width), "later": (later, width)}
    if low is not None:
        fits |= {"low": (low, (*x.shape[:-1], *low.shape[-1:])), "up": (up, (*width, *low.shape[-1:]))}
    for name, (operand, shape) in fits.items():
        if operand is not None and operand.shape != shape:
            raise ValueError(f"{name} has shape {tuple(operand.shape)} but must be {tuple(shape)}")
    residual = None if residual is None else residual.to(x.dtype)
    x, scale, shift = (operand.contiguous() for operand in (x, scale, shift))
    optional = (None if operand is None else operand.contiguous() for operand in (residual, added, gate, later))
    low, up = (None if operand is None else operand.contiguous() for operand in (low, up))
    operands = x, scale, shift, eps, *optional, torch.is_grad_enabled(), low, up, factor
    if residual is None and later is None:
        y, *_, s = FORWARD.with_skip(*operands)
        return s, y
    y, s, copy, _, _ = FORWARD(*operands)
    return s if later is None else copy, y


# the definition


def _for_each_row(vector: Tensor, x: Tensor) -> Tensor:
    """[D] or [N, D] in the dtype of x and in a shape that fits x [N, ..., D]."""
    return vector.to(x.dtype).view(*vector.shape[:-1], *[1] * (x.ndim - 2 if vector.ndim == 2 else 0), vector.shape[-1])


def _sums(scale: Tensor, gate: Tensor | None, needs: Sequence[bool], images: int) -> list[int]:
    """The shape [V, N or 1, D] of the gradients of the vectors that `needs` asks for, of each image if any differs."""
    per_image = scale.ndim == 2 or gate is not None
    return [needs[0] + sum(needs), images if per_image else 1, scale.shape[-1]]


def _reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: Tensor | None,
    added: Tensor | None,
    gate: Tensor | None,
    later: Tensor | None,
    keep: bool,
    low: Tensor | None,
    up: Tensor | None,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y; if there is a residual, s, unless it is only returned with `later` and not to `keep`; the copy; statistics."""
    s = x
    if residual is not None:
        s = s if added is None else s + added.to(x.dtype)
        s = s if low is None or up is None else s + factor * (low @ up.t())
        s = residual + (s if gate is None else _for_each_row(gate, x) * s)
    width = list(x.shape[-1:])
    if scale.ndim == 1:
        y, mean, rstd = torch.native_layer_norm(s, width, scale.to(x.dtype), shift.to(x.dtype), eps)
    else:
        y, mean, rstd = torch.native_layer_norm(s, width, None, None, eps)
        y = y * _for_each_row(scale, x) + _for_each_row(shift, x)
    wide = torch.promote_types(x.dtype, torch.float32)
    # a custom op must not return its argument
    stored = s if stores_sum(residual, later, keep) else x.new_empty(0)
    copy = x.new_empty(0) if later is None else s.flatten(0, -2) + later.to(s.dtype)
    return y, stored, copy, mean.to(wide), rstd.to(wide)


def _reference_backward(
    grad: Tensor,
    skip: Tensor | None,
    s: Tensor,
    x: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    added: Tensor | None,
    gate: Tensor | None,
    later: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """ds; with a gate dx; and as one tensor, if there are any, the gradients of the vectors that `needs` asks for.

    Those are scale and shift, added, gate, and later, each [N, D] or [1, D] as in `_sums`.
    """
    mean, rstd = mean.to(s.dtype), rstd.to(s.dtype)
    xhat = (s - mean) * rstd
    h = grad * _for_each_row(scale, s)
    ds, _, _ = torch.ops.aten.native_layer_norm_backward(
        h, s, list(s.shape[-1:]), mean, rstd, None, None, [True, False, False]
    )
    ds = ds if skip is None else ds + skip
    dx = ds if gate is None else ds * _for_each_row(gate, s)
    found = [ds] if gate is None else [ds, dx]
    parts = [grad * xhat, grad] if needs[0] else []
    if needs[1]:
        parts.append(dx)
    if needs[2]:
        assert x is not None
        parts.append(ds * (x if added is None else x + added.to(x.dtype)))
    if needs[3]:
        parts.append(torch.zeros_like(s) if skip is None else skip)
    if parts:
        per_image = _sums(scale, gate, needs, len(s))[1] == len(s)
        sums = torch.stack([rows.unsqueeze(1 if per_image else 0).flatten(1, -2).sum(1) for rows in parts])
        found.append(sums.to(widest(scale, added, gate, later)))
    return found


# allocate the kernels' outputs; also the ops' fake implementations


def _empty(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: Tensor | None,
    added: Tensor | None,
    gate: Tensor | None,
    later: Tensor | None,
    keep: bool,
    low: Tensor | None,
    up: Tensor | None,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (torch.empty((*x.shape[:-1], 1), dtype=wide, device=x.device) for _ in range(2))
    s = torch.empty_like(x) if stores_sum(residual, later, keep) else x.new_empty(0)
    copy = x.new_empty(0) if later is None else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    return torch.empty_like(x), s, copy, mean, rstd


def _empty_backward(
    grad: Tensor,
    skip: Tensor | None,
    s: Tensor,
    x: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    added: Tensor | None,
    gate: Tensor | None,
    later: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    found = [torch.empty_like(s) for _ in range(1 if gate is None else 2)]
    if any(needs):
        shape = _sums(scale, gate, needs, len(s))
        found.append(torch.empty(shape, dtype=widest(scale, added, gate, later), device=s.device))
    return found


def _triton(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: Tensor | None,
    added: Tensor | None,
    gate: Tensor | None,
    later: Tensor | None,
    keep: bool,
    low: Tensor | None,
    up: Tensor | None,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ddpo_fast_kernels.add_layernorm import add_layernorm

    made = _empty(x, scale, shift, eps, residual, added, gate, later, keep, low, up, factor)
    y, s, copy, mean, rstd = made
    stored, copied = s if stores_sum(residual, later, keep) else None, None if later is None else copy
    added = None if residual is None else added
    operands = x, scale, shift, eps, residual, added, gate, low, up, factor, later
    add_layernorm(*operands, stored, copied, y, mean, rstd)
    return made


def _triton_backward(
    grad: Tensor,
    skip: Tensor | None,
    s: Tensor,
    x: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    added: Tensor | None,
    gate: Tensor | None,
    later: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    from ddpo_fast_kernels.add_layernorm import add_layernorm_backward

    found = _empty_backward(grad, skip, s, x, scale, mean, rstd, added, gate, later, needs)
    dx, sums = None if gate is None else found[1], found[-1] if any(needs) else None
    add_layernorm_backward(grad, skip, s, x, scale, mean, rstd, added, gate, found[0], dx, needs, sums)
    return found


FORWARD = Op("add_layernorm", _reference, _empty, _triton)
BACKWARD = Op("add_layernorm_backward", _reference_backward, _empty_backward, _triton_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scale, _, _, residual, added, gate, later, _, low, up, ctx.factor = inputs
    _, s, _, mean, rstd = output
    mark_outputs(ctx, output, residual, later)
    only_gated = None if gate is None else x
    ctx.save_for_backward(s if ctx.summed else x, only_gated, scale, mean, rstd, added, gate, later, low, up)


def _differentiate(
    ctx: Any,
    grad: Tensor | None,
    of_s: Tensor | None,
    of_copy: Tensor | None,
    _mean: None,
    _rstd: None,
    skip: Tensor | None = None,
) -> Any:
    skip = returned_sums_gradient(ctx, of_s, of_copy, skip)
    if grad is None and skip is None:
        return (None,) * 12
    # once, because checkpointing allows no second reading
    *saved, low, up = ctx.saved_tensors
    s, _, scale, _, _, added, gate, later = saved
    skip = None if skip is None else skip.contiguous().view(s.shape)
    grad = torch.zeros_like(s) if grad is None else grad.contiguous()
    needs = ctx.needs_input_grad
    asked = [needs[1] or needs[2], *needs[5:8]]
    ds, *others = BACKWARD(grad, skip, *saved, asked)
    dx = ds if gate is None else others[0]
    sums = iter(others[-1].unbind() if any(asked) else ())

    def of(vector: Tensor | None, needed: bool) -> Tensor | None:
        if vector is None or not needed:
            return None
        total: Tensor = next(sums)
        return total.sum_to_size(vector.shape if vector.ndim == 2 else (1, *vector.shape)).view(vector.shape)

    dscale, dshift = (of(scale, asked[0]) for _ in range(2))
    dadded, dgate, dlater = map(of, (added, gate, later), asked[1:])
    dlow = dup = None
    if low is not None:
        rows, low_rows = dx.flatten(0, -2), low.flatten(0, -2)
        # with beta=0 the first operand is not read: this is factor * product in one launch
        dlow = torch.addmm(low_rows, rows, up, beta=0, alpha=ctx.factor).view(low.shape) if needs[9] else None
        dup = torch.addmm(up, rows.t(), low_rows, beta=0, alpha=ctx.factor) if needs[10] else None
    dresidual = ds if ctx.summed else None
    return dx, dscale, dshift, None, dresidual, dadded, dgate, dlater, None, dlow, dup, None


FORWARD.register_autograd(_differentiate, setup_context=_save)
