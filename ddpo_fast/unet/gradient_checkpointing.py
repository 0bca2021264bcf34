"""Chooses which activations of a UNet are saved for the backward pass, and which the backward pass computes again."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpo_fast.unet.fused_layers import fuse_unet

MODES = ("none", "selective", "blocks")
# layers whose fused versions save nothing but their input for the backward pass
KEEPS_INPUT_ONLY = (ResnetBlock2D, nn.GroupNorm, GEGLU)


def set_gradient_checkpointing(unet: Any, mode: str) -> Any:
    """Makes a diffusers UNet keep fewer activations for its backward pass, in place, and returns it.

    Args:
        unet: may have an adapter, and may be fused before or after.
        mode: 'none' turns 'blocks' off. 'selective' fuses group norms (with their SiLU) and GEGLU, which then save only
            their input and compute the rest again; on a GPU `fuse_unet` has usually fused them already.
            'blocks' is diffusers' own checkpointing: each residual block and transformer block saves its input and, in
            training mode, runs a second time in the backward pass.

    The gradients stay the same up to rounding. With 'blocks' they are equal in every bit, except where a kernel adds
    numbers up in no fixed order. Layers that are fused stay fused when the mode changes. Raises `ValueError` for
    another mode.
    """
    if mode not in MODES:
        raise ValueError(f"gradient_checkpointing is {mode!r} but must be {', '.join(map(repr, MODES))}")
    if mode == "selective":
        fuse_unet(unet, KEEPS_INPUT_ONLY)
    if mode == "blocks":
        unet.enable_gradient_checkpointing(partial(_checkpointed, preserve_rng_state=_has_dropout(unet)))
    elif unet.is_gradient_checkpointing:
        unet.disable_gradient_checkpointing()
    return unet


def _checkpointed(module: nn.Module, *args: Any, preserve_rng_state: bool) -> Any:
    return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def _has_dropout(unet: nn.Module) -> bool:
    """Whether the second run of a block must draw the same random numbers as the first.

    Without dropout, `checkpoint` need not save the generator's state, which cannot be read from a GPU while a CUDA
    graph is captured.
    """
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in unet.modules())
