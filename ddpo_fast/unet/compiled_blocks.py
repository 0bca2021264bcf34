"""Compiles the blocks that a network repeats, each kind of block once, and leaves what is between them to PyTorch.

A kind takes seconds to compile where the whole network takes minutes. Python between the blocks goes on as before: the
sampler's cache, the rows that guidance shares, gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

REPEATED = (
    ResnetBlock2D,
    BasicTransformerBlock,
    JointTransformerBlock,
    FluxTransformerBlock,
    FluxSingleTransformerBlock,
)


def for_any_rows(*values: Any) -> None:
    """Makes what is compiled for tensors [B, ...] among the values hold for each B above 1.

    PyTorch would compile the first B that it sees as a constant, and again for the second.
    """
    for value in values:
        if isinstance(value, Tensor) and value.ndim > 0:
            torch._dynamo.maybe_mark_dynamic(value, 0)


class CompiledCall:
    """The compiled call of a block, for any number of rows."""

    def __init__(self, call: Callable[..., Any], block: nn.Module) -> None:
        self.call, self.block = call, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for_any_rows(*args, *kwargs.values())
        return self.call(self.block, *args, **kwargs)


def _call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # with hooks, and without the compiled call that `nn.Module.__call__` would look for
    return block._call_impl(*args, **kwargs)


def compile_blocks(network: Any, **options: Any) -> Any:
    """Makes the repeated blocks of a diffusers UNet or transformer compile at their first calls; returns the network.

    In place; parameters, their names and the blocks' classes stay, and a copy or a pickle of the network is not
    compiled. Blocks of one class whose weights have the same shapes share what is compiled. Call it after layers were
    fused and an adapter was added.

    Args:
        options: of `torch.compile`.
    """
    calls: dict[Any, Callable[..., Any]] = {}
    for block in network.modules():
        if isinstance(block, REPEATED):
            kind = type(block), tuple((name, weight.shape) for name, weight in block.named_parameters())
            if kind not in calls:
                # Code of its own for each kind: PyTorch keeps what it has compiled by the code, which it searches at
                # each call and compiles 8 times at most, and by the code's name the sizes that have changed.
                code = _call.__code__.replace(co_name=f"{type(block).__name__}_{len(calls)}")
                calls[kind] = torch.compile(FunctionType(code, globals()), **options)
            # where `nn.Module.compile` puts it too
            block._compiled_call_impl = CompiledCall(calls[kind], block)
    return network


def is_compiled(block: nn.Module) -> bool:
    """Whether a block's calls are compiled, or it is called by something that is: it then takes tensors only."""
    return torch.compiler.is_compiling() or block._compiled_call_impl is not None
