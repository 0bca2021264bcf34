"""Linear layers of a UNet, with and without an adapter, and the three of a self-attention as one op."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from ddpo_fast.ops.linear import linear, onednn_is_faster
from ddpo_fast.ops.lora_linear import lora_linear
from ddpo_fast.ops.qkv_linear import lora_qkv_linear, qkv_linear
from ddpo_fast.unet import convolutions
from ddpo_fast.unet.convolutions import is_bare, is_hooked


class FusedLinear(nn.Linear):
    """A linear layer by the faster of PyTorch's two libraries for matrix products on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype and onednn_is_faster(x.device.type, x.dtype):
            return linear(x, self.weight, self.bias)
        return super().forward(x)


class FusedLoraLinear(lora.Linear):
    """A linear layer with one plain LoRA adapter, as a single op.

    In any other state (several active adapters, merged or disabled adapters, dropout, hooks, ...) peft's code runs.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = None if args or kwargs else self.only_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        low: Any = self.lora_A[adapter]
        high: Any = self.lora_B[adapter]
        return lora_linear(x, base.weight, base.bias, low.weight, high.weight, float(self.scaling[adapter]))

    def only_adapter(self) -> str | None:
        """The name of the active adapter if it is the only one, is plain, and lies on a frozen layer; else None."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.merged or self.disable_adapters:
            return None
        adapter, base = active[0], self.base_layer
        low, high, dropout = (part[adapter] for part in (self.lora_A, self.lora_B, self.lora_dropout))
        plain = (
            adapter not in self.lora_variant
            and not self.fan_in_fan_out
            and high.bias is None
            and not (self.training and getattr(dropout, "p", 0.0) > 0)
            and type(base) in (nn.Linear, FusedLinear)
            and not any_requires_grad(base)
            and not any(map(is_hooked, (base, low, high)))
        )
        return adapter if plain else None


def any_requires_grad(layer: nn.Linear | nn.Conv2d) -> bool:
    return layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)


def query_key_value(attention: Any, rows: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections of an attention: rows [B, M, D] and the text or None -> three of [B, M, H K].

    Those of a self-attention are one op where nothing else runs in their place, and so are the keys and values of all
    cross-attentions (`text_projections.py`).
    """
    layers = attention.to_q, attention.to_k, attention.to_v
    if context is None:
        return project_three(layers, rows)
    # a compiler would have to follow what is kept from one attention to the next
    if context is not None and convolutions.adds_in_kernels(rows) and not torch.compiler.is_compiling():
        # set by `project_text_together`
        text = getattr(attention, "text", None)
        taken = None if text is None else text.take(attention.text_index, context)
        if taken is not None:
            return layers[0](rows), *taken
    return layers[0](rows), layers[1](context), layers[2](context)


def project_three(layers: tuple[Any, Any, Any], rows: Tensor, packed: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Three layers of the same rows, as one op where nothing else runs in their place; `packed` as for that."""
    # to a compiler the op would have to return copies of its three results
    if convolutions.adds_in_kernels(rows) and not torch.compiler.is_compiling():
        for bias in (False, True):
            if are_one_op(layers, rows, bias):
                weights = tuple(layer.weight for layer in layers)
                return qkv_linear(rows, weights, tuple(layer.bias for layer in layers) if bias else None, packed)
        if (adapter := _common_adapter(layers)) is not None:
            weights, low, high, biases = (
                tuple(map(get, layers))
                for get in (
                    lambda of: of.base_layer.weight,
                    lambda of: of.lora_A[adapter].weight,
                    lambda of: of.lora_B[adapter].weight,
                    lambda of: of.base_layer.bias,
                )
            )
            given = None if biases[0] is None else biases
            return lora_qkv_linear(rows, weights, low, high, float(layers[0].scaling[adapter]), given, packed)
    return layers[0](rows), layers[1](rows), layers[2](rows)


def are_one_op(layers: tuple[Any, ...], rows: Tensor, bias: bool = False) -> bool:
    """Whether layers are nothing but matrix products in the dtype of `rows`, all with or all without a bias."""
    return not convolutions.is_autocast(rows) and all(
        is_bare(layer, nn.Linear, FusedLinear) and (layer.bias is not None) == bias and layer.weight.dtype == rows.dtype
        for layer in layers
    )


def _common_adapter(layers: tuple[Any, ...]) -> str | None:
    """The name of the adapter that all layers have as their only one, with one scaling; else None.

    All or none must have a bias.
    """
    if not all(is_bare(layer, FusedLoraLinear) for layer in layers):
        return None
    adapters = {(adapter := layer.only_adapter(), layer.scaling.get(adapter)) for layer in layers}
    adapter, _ = adapters.pop()
    # a base layer of another kind, a quantized one for instance, has no plain adapter, and may have no bias to ask for
    if adapters or adapter is None or len({layer.base_layer.bias is None for layer in layers}) > 1:
        return None
    return adapter
