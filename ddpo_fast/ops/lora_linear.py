"""A linear layer with a low-rank adapter (LoRA, arXiv 2106.09685) in three matrix products forward and five backward.

M rows of x, I inputs, O outputs, rank r. There is no kernel besides the reference, because library GEMMs do all the
work. They also add and scale (`beta` and `alpha`), so that no elementwise kernel runs between them.
"""

from __future__ import annotations

from typing import Any

import torch

from ddpo_fast.ops.backend import Op
from ddpo_fast.ops.linear import product
from ddpo_fast.ops.operands import with_frozen


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """`x W^T + b + scaling (x A^T) B^T`: [..., I] -> [..., O]; the gradient flows to x, A and B.

    `weight` [O, I] and `bias` [O] are frozen; `lora_a` is [r, I], `lora_b` [O, r]. The operands are cast to autocast's
    dtype where autocast is on, else to the weight's, and the result has that dtype; gradients have the dtypes of the
    operands before the cast. Raises `ValueError` if the weight or the bias requires a gradient.
    """
    x, weight, bias = with_frozen("lora_linear", x, weight, bias)
    return FORWARD(x, weight, bias, lora_a.to(x.dtype), lora_b.to(x.dtype), scaling)[0]


def two_products(x: torch.Tensor, weight: torch.Tensor, lora_a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x W^T` and `x A^T`: [..., I] -> [..., O] and [..., r]; the gradient flows to x and A.

    For a kernel that adds the rest of the layer where it reads the first result: added by a matrix product, as in
    `lora_linear`, it would take another pass over that. All have one dtype. Raises `ValueError` if the weight [O, I]
    requires a gradient.
    """
    x, weight, _ = with_frozen("two_products", x, weight, None)
    return PRODUCTS(x, weight, lora_a)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    y = product(rows, weight, bias)
    low = rows @ lora_a.t()
    y.addmm_(low, lora_b.t(), alpha=scaling)
    return y.view(*x.shape[:-1], len(weight)), low


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    low: torch.Tensor,
    scaling: float,
    needs_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_rows, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_low = grad_rows @ lora_b
    # a custom op cannot return None, so an empty tensor stands for no gradient
    grad_x = x.new_empty(0)
    if needs_x:
        grad_x = product(grad_rows, weight.t()).addmm_(grad_low, lora_a, alpha=scaling).view(x.shape)
    # with beta=0 the first operand is not read: this is scaling * product in one launch
    grad_a = torch.addmm(lora_a, grad_low.t(), rows, beta=0, alpha=scaling)
    grad_b = torch.addmm(lora_b, grad_rows.t(), low, beta=0, alpha=scaling)
    return grad_x, grad_a, grad_b


def _products(x: torch.Tensor, weight: torch.Tensor, lora_a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, sizes = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    return product(rows, weight).view(*sizes, len(weight)), (rows @ lora_a.t()).view(*sizes, len(lora_a))


def _products_backward(
    grad: torch.Tensor, grad_low: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, lora_a: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_rows, low_rows, rows = (rows.reshape(-1, rows.shape[-1]) for rows in (grad, grad_low, x))
    grad_x = product(grad_rows, weight.t()).addmm_(low_rows, lora_a)
    return grad_x.view(x.shape), low_rows.t() @ rows


FORWARD = Op("lora_linear", _forward, _forward)
BACKWARD = Op("lora_linear_backward", _backward, _backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _, lora_a, lora_b, ctx.scaling = inputs
    _, low = output
    ctx.mark_non_differentiable(low)
    # without this, autograd would allocate zeros for the gradient of `low` in every backward pass
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_a, lora_b, low)


def _gradients(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
    grad_x, grad_a, grad_b = BACKWARD(grad, *ctx.saved_tensors, ctx.scaling, needs_x)
    return grad_x if needs_x else None, None, None, grad_a if needs_a else None, grad_b if needs_b else None, None


FORWARD.register_autograd(_gradients, setup_context=_save)


PRODUCTS = Op("two_products", _products, _products)
PRODUCTS_BACKWARD = Op("two_products_backward", _products_backward, _products_backward)


def _save_products(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _gradients_of_products(ctx: Any, grad: torch.Tensor, grad_low: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_x, grad_a = PRODUCTS_BACKWARD(grad, grad_low, *ctx.saved_tensors)
    return grad_x, None, grad_a


PRODUCTS.register_autograd(_gradients_of_products, setup_context=_save_products)
