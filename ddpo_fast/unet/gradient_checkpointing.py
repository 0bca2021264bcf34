"""Which activations of a UNet are kept for the backward pass, and which are computed again in it."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpo_fast.unet.fused_layers import fuse_unet

MODES = ("none", "selective", "blocks")
# their fused versions keep their input and nothing else
KEEPS_INPUT_ONLY = (ResnetBlock2D, nn.GroupNorm, GEGLU)


def set_gradient_checkpointing(unet: Any, mode: str) -> Any:
    """Makes a diffusers UNet keep less for its backward pass, in place, and returns it.

    Args:
        unet: may have an adapter, be fused already, or be fused later.
        mode: 'none'; 'selective' fuses group norms (with their SiLU) and GEGLU, which then keep their input only; on
            a GPU `fuse_unet` has done that already. 'blocks' is diffusers' own checkpointing: each residual block and
            transformer block keeps its input and runs a second time, in training mode only.

    The gradients stay the same, for 'blocks' to the bit (unless an op's sums have no fixed order). Layers that are
    fused stay so when the mode changes. Raises `ValueError` for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"gradient_checkpointing is {mode!r} but must be {', '.join(map(repr, MODES))}")
    if mode == "selective":
        fuse_unet(unet, KEEPS_INPUT_ONLY)
    if mode == "blocks":
        unet.enable_gradient_checkpointing(partial(_run_twice, preserves_random_state=_draws(unet)))
    elif unet.is_gradient_checkpointing:
        unet.disable_gradient_checkpointing()
    return unet


def _run_twice(module: nn.Module, *args: Any, preserves_random_state: bool) -> Any:
    return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=preserves_random_state)


def _draws(unet: nn.Module) -> bool:
    """Whether the second run must draw the same random numbers: else nothing asks a device for its generator's state,
    which a recorded CUDA graph could not."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in unet.modules())
