"""A linear layer that uses the faster of PyTorch's two libraries for matrix products on a CPU.

PyTorch computes fp32 matrix products with MKL and convolutions with oneDNN. On AVX-512 processors that are not Intel's,
MKL uses only 256-bit vectors, and oneDNN uses all 512 bits. M rows of x, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpo_fast.ops.backend import Op


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`: [..., I] -> [..., O], differentiable; faster than PyTorch's for fp32 on a CPU.

    `weight` is [O, I], `bias` [O].
    """
    return FORWARD(x, weight, bias)


def product(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x W^T + b` for matrices of any strides, by oneDNN where it is faster; not differentiable."""
    if onednn_is_faster(x_MI.device.type, x_MI.dtype) and x_MI.numel():
        # PyTorch's internal op for a linear layer by oneDNN; "none" means that no activation follows
        return torch.ops.mkldnn._linear_pointwise(x_MI, weight_OI, bias_O, "none", [], "")
    return x_MI @ weight_OI.t() if bias_O is None else torch.addmm(bias_O, x_MI, weight_OI.t())


@torch.compiler.assume_constant_result
def onednn_is_faster(device_type: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN uses wider vectors than MKL for this dtype on this processor."""
    return _onednn_is_faster(device_type, dtype)


# A separate function, because torch.compile ignores functools.cache and would trace the body, which reads a file. It
# does not trace a function with `assume_constant_result`, such as the one above.
@functools.cache
def _onednn_is_faster(device_type: str, dtype: torch.dtype) -> bool:
    return (
        (device_type, dtype) == ("cpu", torch.float32)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not _is_intel()
    )


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        # unknown processor: leave PyTorch's own choice
        return True


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def _backward(grad: Tensor, x: Tensor | None, weight: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """Returns the gradients that `needs` asks for, of x, weight and bias; x is used for the weight's gradient only."""
    grad_MO = grad.reshape(-1, grad.shape[-1])
    grads = []
    if needs[0]:
        grads.append(product(grad_MO, weight.t()).view(*grad.shape[:-1], weight.shape[1]))
    if needs[1]:
        assert x is not None
        grads.append(product(grad_MO.t(), x.reshape(-1, x.shape[-1]).t()))
    if needs[2]:
        grads.append(grad_MO.sum(0))
    return grads


def _empty(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _empty_backward(grad: Tensor, x: Tensor | None, weight: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    shapes = ((*grad.shape[:-1], weight.shape[1]), weight.shape, weight.shape[:1])
    return [grad.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


FORWARD = Op("linear", _forward, _empty)
BACKWARD = Op("linear_backward", _backward, _empty_backward)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = iter(BACKWARD(grad, *ctx.saved_tensors, list(ctx.needs_input_grad)))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


FORWARD.register_autograd(_gradients, setup_context=_save)
