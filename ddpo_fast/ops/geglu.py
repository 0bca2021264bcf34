"""GEGLU (arXiv 2002.05202): one half of a projection, passed through the exact GELU, multiplies the other half."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpo_fast.ops.backend import Op, csrc_kernel


def geglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a * gelu(g)` with `a, g = (x + bias).chunk(2, -1)` and `gelu(g) = g (1 + erf(g / sqrt(2))) / 2`.

    Args:
        x: [..., 2I] fp16, bf16 or fp32 (fp64: by the reference), the output of the projection in diffusers' GEGLU.
        bias: [2I] of the projection, in the dtype of `x` or a wider one, if the projection has not added it. Its
            gradient, the sum of all rows of the gradient of `x`, then needs no kernel that reads those again.

    Returns [..., I], contiguous, in the dtype of `x`. Only `x` is saved for the backward pass. Raises `ValueError` if
    the last dimension is odd or the bias has another size.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but its last dimension must be even: values, then gates")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)} but x has {x.shape[-1]} columns")
    return FORWARD(x.contiguous(), bias)


# the definition


def _halves(x: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    return (x if bias is None else x + bias.to(x.dtype)).chunk(2, -1)


def _reference(x: Tensor, bias: Tensor | None) -> Tensor:
    a, g = _halves(x, bias)
    return a * F.gelu(g)


def _reference_backward(grad: Tensor, x: Tensor, bias: Tensor | None, needs_bias: bool) -> list[Tensor]:
    """dx and, if `needs_bias`, the gradient of the bias."""
    a, g = _halves(x, bias)
    dx = torch.cat([grad * F.gelu(g), torch.ops.aten.gelu_backward(grad * a, g)], dim=-1)
    if not needs_bias:
        return [dx]
    assert bias is not None
    return [dx, dx.reshape(-1, dx.shape[-1]).sum(0).to(bias.dtype)]


# allocate the kernels' outputs; also the ops' fake implementations


def _empty(x: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


def _empty_backward(grad: Tensor, x: Tensor, bias: Tensor | None, needs_bias: bool) -> list[Tensor]:
    return [torch.empty_like(x), *([torch.empty_like(bias)] if bias is not None and needs_bias else [])]


def _triton(x: Tensor, bias: Tensor | None) -> Tensor:
    from ddpo_fast_kernels.geglu import geglu

    y = _empty(x, bias)
    geglu(x, bias, y)
    return y


def _triton_backward(grad: Tensor, x: Tensor, bias: Tensor | None, needs_bias: bool) -> list[Tensor]:
    from ddpo_fast_kernels.geglu import geglu_backward

    found = _empty_backward(grad, x, bias, needs_bias)
    geglu_backward(grad, x, bias, found[0], found[1] if len(found) > 1 else None)
    return found


def _csrc_backward(grad: Tensor, x: Tensor, bias: Tensor | None, needs_bias: bool) -> list[Tensor]:
    found = _empty_backward(grad, x, bias, needs_bias)
    torch.ops.ddpo_fast_csrc.geglu_backward(grad, x, bias, found[0], found[1] if len(found) > 1 else None)
    return found


FORWARD = Op("geglu", _reference, _empty, _triton, csrc_kernel("geglu", _empty))
BACKWARD = Op("geglu_backward", _reference_backward, _empty_backward, _triton_backward, _csrc_backward)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx, *dbias = BACKWARD(grad.contiguous(), *ctx.saved_tensors, ctx.needs_input_grad[1])
    return dx, (dbias[0] if dbias else None)


FORWARD.register_autograd(_differentiate, setup_context=_save)
