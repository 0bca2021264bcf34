"""GEGLU (arXiv 2002.05202): one half of a projection, passed through the exact GELU, multiplies the other half."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpo_fast.ops.backend import Op, triton_kernel


def geglu(x: Tensor) -> Tensor:
    """`a * gelu(g)` with `a, g = x.chunk(2, -1)` and `gelu(g) = g (1 + erf(g / sqrt(2))) / 2`.

    Args:
        x: [..., 2I] fp16, bf16 or fp32 (fp64: by the reference), the output of the projection in diffusers' GEGLU.

    Returns [..., I], contiguous, in the dtype of `x`. Only `x` is saved for the backward pass. Raises `ValueError` if
    the last dimension is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but its last dimension must be even: values, then gates")
    return FORWARD(x.contiguous())


# the definition


def _reference(x: Tensor) -> Tensor:
    a, g = x.chunk(2, -1)
    return a * F.gelu(g)


def _reference_backward(grad: Tensor, x: Tensor) -> Tensor:
    a, g = x.chunk(2, -1)
    return torch.cat([grad * F.gelu(g), torch.ops.aten.gelu_backward(grad * a, g)], dim=-1)


# allocate the kernels' outputs; also the ops' fake implementations


def _empty(x: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


def _empty_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


FORWARD = Op("geglu", _reference, _empty, triton_kernel("geglu", _empty))
BACKWARD = Op("geglu_backward", _reference_backward, _empty_backward, triton_kernel("geglu_backward", _empty_backward))


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Tensor:
    return BACKWARD(grad.contiguous(), *ctx.saved_tensors)


FORWARD.register_autograd(_differentiate, setup_context=_save)
