"""Keeps frozen linear layers in 8 or 4 bits a weight, by bitsandbytes' kernels.

A weight is divided by the largest magnitude of its block, and the quotient is replaced by the nearest of 256 evenly
spaced values, or of the 16 of NF4 (QLoRA, arXiv 2305.14314). Each call makes the whole weight again, in the precision
of its input, and multiplies by it, in the forward and in the backward pass. bitsandbytes' own layers would not do:
LLM.int8 also rounds the input, by a rule that looks at all rows, and the 4-bit layer takes other kernels without
gradients than with them. PPO's ratio compares the two, and a row's output must not depend on other rows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# weights that share a scale: NF4's usual number, and for 8 bits as many as bitsandbytes' optimizers have
BLOCKS = {"8bit": 256, "4bit": 64}
# Layers with fewer weights stay as they are, as bitsandbytes' optimizers leave small tensors.
LEAST = 4096


class QuantizedLinear(nn.Module):
    """A frozen linear layer [..., I] -> [..., O] whose weight is kept in 8 or 4 bits.

    Args:
        linear: the layer. Its weight's tensor is kept where it is, for saving: in host memory, and if it was read from
            a safetensors file it is mapped from there and takes none.
        kind: '8bit' or '4bit'.
        device: where the quantized weight is kept.
        dtype: what the network around it computes in.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, kind: str, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind, self.dtype = kind, dtype
        self.stored = linear.weight.data
        self.bias = linear.bias
        packed, scales = _quantized(self.stored.to(device), kind)
        # not in the state dict, which has the stored weight. The fp32 scales are kept as bytes, because `Module.to`
        # would round them with the other tensors.
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales.view(torch.uint8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] that the layer computes with."""
        scales, shape = self.scales.view(torch.float32), (self.out_features, self.in_features)
        if scales.is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        ops, block = torch.ops.bitsandbytes, BLOCKS[self.kind]
        if self.kind == "4bit":
            # a block a row: where rows are not whole blocks, bitsandbytes' AVX-512 kernel takes other blocks' scales
            return ops.dequantize_4bit(self.packed, scales, block, "nf4", (len(scales), block), dtype).view(shape)
        return ops.dequantize_blockwise(self.packed, scales, _levels(self.packed.device), block, dtype).view(shape)

    @property
    def weight(self) -> Tensor:
        """`dequantized` in `dtype`: transformers' T5 asks for it."""
        return self.dequantized(self.dtype)

    def plain(self) -> nn.Linear:
        """A linear layer with the stored weight."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(self.stored, requires_grad=False)
        linear.bias = self.bias
        return linear

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.stored


class _Product(torch.autograd.Function):
    """`F.linear` that keeps neither its input nor the whole weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantized(grad.dtype), None


def check_is_lora(kind: str, use_lora: bool) -> None:
    """Raises `ValueError` if weights are to be quantized of which all are trained."""
    if kind != "none" and not use_lora:
        raise ValueError(
            f"quantize_frozen is {kind!r}, but all weights of the network are trained: train a LoRA, or use 'none'"
        )


def quantize_linears(network: nn.Module, kind: str, device: torch.device | str, dtype: torch.dtype) -> None:
    """Replaces the network's frozen linear layers by quantized ones on the device; small ones stay.

    Layers on which an adapter lies are replaced below it; the adapters themselves stay.
    """
    for name, module in list(network.named_modules()):
        for child, linear in list(module.named_children()):
            if fits(f"{name}.{child}", linear):
                setattr(module, child, QuantizedLinear(linear, kind, device, dtype))


def fits(name: str, module: nn.Module) -> bool:
    """Whether `quantize_linears` replaces a network's module of this name."""
    return (
        isinstance(module, nn.Linear)
        and "lora_" not in name
        and not module.weight.requires_grad
        and module.weight.numel() >= LEAST
        # whole blocks of either kind
        and module.weight.numel() % BLOCKS["8bit"] == 0
    )


def unquantized(layer: Any) -> Any:
    """An adapted layer of peft's with its stored weight, to merge adapters into: `layer` itself, changed in place."""
    if isinstance(layer.base_layer, QuantizedLinear):
        layer.base_layer = layer.base_layer.plain()
    return layer


def _quantized(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(the packed weight uint8, a scale for each block fp32)."""
    block = BLOCKS[kind]
    if weight.is_meta:
        # the planner needs sizes only, and no bitsandbytes
        packed = torch.empty(weight.numel() // (2 if kind == "4bit" else 1), dtype=torch.uint8, device="meta")
        return packed, torch.empty(weight.numel() // block, dtype=torch.float32, device="meta")
    _load_kernels()
    ops = torch.ops.bitsandbytes
    if kind == "4bit":
        return ops.quantize_4bit(weight.contiguous(), block, "nf4", torch.uint8)
    return ops.quantize_blockwise(weight.contiguous(), _levels(weight.device), block)


@functools.cache
def _levels(device: torch.device) -> Tensor:
    """The 256 values that 8 bits stand for: -1 to 1 in 254 steps, 0, and one more that is never nearest."""
    from bitsandbytes.functional import create_linear_map

    return create_linear_map(signed=True, total_bits=8).to(device)


def _load_kernels() -> None:
    """Imports bitsandbytes, which registers its operators; that takes seconds, and only this setting needs them."""
    import bitsandbytes  # noqa: F401
