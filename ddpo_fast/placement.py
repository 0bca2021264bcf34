"""Puts a pipeline's networks where they compute, in their precision, with the layers that the settings name."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ddpo_fast.config import DDPOConfig
from ddpo_fast.device_memory import limit_memory
from ddpo_fast.engine import compute_dtype, exact_weights
from ddpo_fast.measured import Measured
from ddpo_fast.offload_frozen import sleep
from ddpo_fast.processes import broadcast_from_main
from ddpo_fast.unet import FusedLoraLinear, faster_layers, fuse_unet, set_attention, set_gradient_checkpointing


def place_networks(
    pipeline: Any, config: DDPOConfig, accelerator: Accelerator, measured: Measured | None = None
) -> Any:
    """Puts the networks where they belong: frozen ones in the compute precision, trained weights in fp32.

    Args:
        measured: the run's; which attention is the fastest is asked of it, and kept there.

    Returns what the pipeline wants to have trained.
    """
    device, dtype = accelerator.device, compute_dtype(config.mixed_precision)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if config.gpu_memory is not None and device.type == "cuda":
        limit_memory(config.gpu_memory, device)
    for frozen in (pipeline.vae, pipeline.text_encoder):
        if config.offload_frozen:
            sleep(frozen, dtype)
        else:
            frozen.to(device, dtype=dtype)
    own_precision = pipeline.autocast is not None
    layers = pipeline.get_trainable_layers()
    trained = {id(parameter) for parameter in trainable_parameters(layers)}
    # exact weights must not take the device's memory where they stay on the host, or DeepSpeed casts them first
    home = "cpu" if exact_weights(config) == "host" or config.uses_deepspeed else device
    for parameter in [*pipeline.unet.parameters(), *trainable_parameters(layers)]:
        # half-precision weights would round small updates away
        exact = id(parameter) in trained or own_precision
        there = home if id(parameter) in trained else device
        parameter.data = parameter.data.to(there, torch.float32 if exact else dtype)
    for buffer in pipeline.unet.buffers():
        buffer.data = buffer.data.to(device)
    agree = partial(broadcast_from_main, accelerator)
    set_attention(pipeline.unet, config.attention, device, dtype, measured, agree)
    if config.fuse_unet:
        layers_that_pay = faster_layers(device)
        if config.uses_deepspeed:
            # reads its adapter's weights without calling it, and then stage 3 does not bring them together
            layers_that_pay -= {FusedLoraLinear}
        else:
            # DeepSpeed sends and flattens contiguous weights only
            pipeline.unet.to(memory_format=torch.channels_last)
        fuse_unet(pipeline.unet, layers_that_pay)
    set_gradient_checkpointing(pipeline.unet, config.gradient_checkpointing)
    if config.vae_slicing:
        pipeline.vae.enable_slicing()
    if config.vae_tiling:
        pipeline.vae.enable_tiling()
    if config.compile_unet:
        pipeline.unet.compile()
    return layers


def compute_precision(pipeline: Any, config: DDPOConfig) -> str | None:
    """What the trained network computes in: 'no', 'fp16' or 'bf16'.

    A pipeline with an autocast of its own computes in that, from weights in fp32.
    """
    return "no" if pipeline.autocast is not None else config.mixed_precision


def trainable_parameters(layers: Any) -> list[nn.Parameter]:
    """The parameters with a gradient among a module's or a list's."""
    parameters = layers if isinstance(layers, list) else layers.parameters()
    return [p for p in parameters if p.requires_grad]
