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


def add_layernorm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: Tensor | None = None,
    added: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`s = residual + gate * (x + added)` and `y = (s - mean) / sqrt(var + eps) * scale + shift`; returns (s, y).

    Args:
        x: [N, ..., D] fp16, bf16 or fp32 (fp64: by the reference). `mean` and `var` of each row of s are computed in
            fp32.
        scale, shift: [D], or [N, D] for each image its own (AdaLN; `scale` with the 1 that is added to it).
        residual: like `x`. Without it s is `x`, and `added` and `gate` must be None.
        added: [D], the bias of the layer that made `x`, if that has not added it; its gradient is summed here.
        gate: [N, D]; without it 1.

    Returns s and y in the dtype of `x`, dense. Saved for the backward pass are s, with a gate `x`, and the rows'
    statistics. The gradient of s, from its other uses, is added in the kernel of the backward pass. Raises `ValueError`
    for shapes that do not fit.
    """
    images, width = x.shape[:1], x.shape[-1:]
    if scale.shape not in (width, images + width) or shift.shape != scale.shape:
        raise ValueError(
            f"scale and shift have shapes {tuple(scale.shape)} and {tuple(shift.shape)}, x {tuple(x.shape)}"
        )
    if residual is None:
        if added is not None or gate is not None:
            raise ValueError("added and gate belong to a sum, but there is no residual")
        y, _, _, _, s = FORWARD.with_skip(x.contiguous(), scale.contiguous(), shift.contiguous(), eps, None, None, None)
        return s, y
    fits = {"residual": (residual, x.shape), "added": (added, width), "gate": (gate, images + width)}
    for name, (operand, shape) in fits.items():
        if operand is not None and operand.shape != shape:
            raise ValueError(f"{name} has shape {tuple(operand.shape)} but must be {tuple(shape)}")
    operands = (None if operand is None else operand.contiguous() for operand in (residual.to(x.dtype), added, gate))
    y, s, _, _ = FORWARD(x.contiguous(), scale.contiguous(), shift.contiguous(), eps, *operands)
    return s, y


# the definition


def _for_each_row(vector: Tensor, x: Tensor) -> Tensor:
    """[D] or [N, D] in the dtype of x and in a shape that fits x [N, ..., D]."""
    return vector.to(x.dtype).view(*vector.shape[:-1], *[1] * (x.ndim - 2 if vector.ndim == 2 else 0), vector.shape[-1])


def _summed(rows: Tensor, of_images: bool = False) -> Tensor:
    """The sum of all rows of [N, ..., D], [D], or of each image's, [N, D]."""
    return rows.unsqueeze(1).flatten(1, -2).sum(1) if of_images else rows.flatten(0, -2).sum(0)


def _are_one_sum(scale: Tensor, added: Tensor | None, gate: Tensor | None, needs: Sequence[bool]) -> bool:
    """Whether one launch can add up the parts of the gradients of scale, shift and added, into one tensor [3, D]."""
    alike = added is not None and gate is None and scale.ndim == 1 and scale.dtype == added.dtype
    return alike and needs[0] and needs[1]


def _reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: Tensor | None,
    added: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = x
    if residual is not None:
        s = s if added is None else s + added.to(x.dtype)
        s = residual + (s if gate is None else _for_each_row(gate, x) * s)
    width = list(x.shape[-1:])
    if scale.ndim == 1:
        y, mean, rstd = torch.native_layer_norm(s, width, scale.to(x.dtype), shift.to(x.dtype), eps)
    else:
        y, mean, rstd = torch.native_layer_norm(s, width, None, None, eps)
        y = y * _for_each_row(scale, x) + _for_each_row(shift, x)
    wide = torch.promote_types(x.dtype, torch.float32)
    # a custom op must not return its argument
    return y, x.new_empty(0) if residual is None else s, mean.to(wide), rstd.to(wide)


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
    needs: Sequence[bool],
) -> list[Tensor]:
    """ds; with a gate dx; then of the gradients of scale and shift (as one tensor), added and gate those in `needs`.

    That of `added` is a third part of the first tensor where `_are_one_sum`.
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
    if needs[0]:
        parts = (grad * xhat, grad, dx) if _are_one_sum(scale, added, gate, needs) else (grad * xhat, grad)
        found.append(torch.stack([_summed(rows, scale.ndim == 2) for rows in parts]).to(scale.dtype))
    if needs[1] and not _are_one_sum(scale, added, gate, needs):
        assert added is not None
        found.append(_summed(dx).to(added.dtype))
    if needs[2]:
        assert gate is not None
        assert x is not None
        gated = x if added is None else x + added.to(x.dtype)
        found.append(_summed(ds * gated, of_images=True).to(gate.dtype))
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (torch.empty((*x.shape[:-1], 1), dtype=wide, device=x.device) for _ in range(2))
    return torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x), mean, rstd


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
    needs: Sequence[bool],
) -> list[Tensor]:
    found = [torch.empty_like(s) for _ in range(1 if gate is None else 2)]
    if _are_one_sum(scale, added, gate, needs):
        return [*found, scale.new_empty((3, *scale.shape))]
    if needs[0]:
        found.append(scale.new_empty((2, *scale.shape)))
    return found + [torch.empty_like(o) for o, n in zip((added, gate), needs[1:], strict=True) if n and o is not None]


def _triton(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: Tensor | None,
    added: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ddpo_fast_kernels.add_layernorm import add_layernorm

    y, s, mean, rstd = _empty(x, scale, shift, eps, residual, added, gate)
    add_layernorm(x, scale, shift, eps, residual, added, gate, None if residual is None else s, y, mean, rstd)
    return y, s, mean, rstd


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
    needs: Sequence[bool],
) -> list[Tensor]:
    from ddpo_fast_kernels.add_layernorm import add_layernorm_backward
    from ddpo_fast_kernels.launch import sum_parts

    found = [torch.empty_like(s) for _ in range(1 if gate is None else 2)]
    affine, of_added, of_gate = add_layernorm_backward(
        *(grad, skip, s, x, scale, mean, rstd, added, gate, found[0], None if gate is None else found[1]),
        needs,
        _are_one_sum(scale, added, gate, needs),
    )
    width = s.shape[-1]
    if affine is not None and _are_one_sum(scale, added, gate, needs):
        # the kernel's launcher has allocated the parts of all three as one
        found.append(sum_parts(affine.view(3, -1, width), scale.dtype))
        return found
    if affine is not None:
        # [D], or [N, D] with a sum for each image
        kept = 2 * len(scale) if scale.ndim == 2 else 2
        found.append(sum_parts(affine.view(kept, -1, width), scale.dtype).view(2, *scale.shape))
    if of_added is not None and added is not None:
        found.append(sum_parts(of_added.view(1, -1, width), added.dtype)[0])
    if of_gate is not None and gate is not None:
        found.append(sum_parts(of_gate, gate.dtype))
    return found


FORWARD = Op("add_layernorm", _reference, _empty, _triton)
BACKWARD = Op("add_layernorm_backward", _reference_backward, _empty_backward, _triton_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scale, _, _, residual, added, gate = inputs
    _, s, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(mean, rstd, *([] if ctx.has_residual else [s]))
    # without this, autograd would allocate zeros for the gradients of mean and rstd in every backward pass
    ctx.set_materialize_grads(False)
    only_gated = None if gate is None else x
    ctx.save_for_backward(s if ctx.has_residual else x, only_gated, scale, mean, rstd, added, gate)


def _differentiate(ctx: Any, grad: Tensor | None, of_s: Tensor | None, *others: Tensor | None) -> Any:
    skip = of_s if ctx.has_residual else (others[2] if len(others) == 3 else None)
    if grad is None:
        if skip is None:
            return (None,) * 7
        grad = torch.zeros_like(skip)
    # once, because checkpointing allows no second reading
    saved = ctx.saved_tensors
    gate = saved[-1]
    needs = ctx.needs_input_grad
    asked = [needs[1] or needs[2], needs[5], needs[6]]
    found = iter(BACKWARD(grad.contiguous(), None if skip is None else skip.contiguous(), *saved, asked))
    ds = next(found)
    dx = ds if gate is None else next(found)
    if _are_one_sum(saved[2], saved[5], gate, asked):
        dscale, dshift, dadded = next(found).unbind()
        return dx, dscale, dshift, None, ds if ctx.has_residual else None, dadded, None
    dscale, dshift = next(found).unbind() if asked[0] else (None, None)
    dadded, dgate = (next(found) if needed else None for needed in asked[1:])
    return dx, dscale, dshift, None, ds if ctx.has_residual else None, dadded, dgate


FORWARD.register_autograd(_differentiate, setup_context=_save)
