"""Where a run's networks and trained weights are, in which precision, and which engine trains them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ddpo_fast.attention import set_attention
from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine import Engine, compute_dtype
from ddpo_fast.fuse_unet import FusedLoraLinear, faster_layers, fuse_unet
from ddpo_fast.idle import sleep
from ddpo_fast.master_weights import MasterWeights, Truth
from ddpo_fast.measured import Measured
from ddpo_fast.plan import CUDA_CONTEXT, GB
from ddpo_fast.processes import the_main_one
from ddpo_fast.recompute import set_recompute
from ddpo_fast.zero import ZeroEngine
from ddpo_fast.zero_settings import prepare_communication, zero_settings


def place_networks(
    pipeline: Any, config: DDPOConfig, accelerator: Accelerator, measured: Measured | None = None
) -> Any:
    """Puts the networks where they belong: frozen ones in the compute precision, trained weights in fp32.

    Args:
        measured: the run's; which attention is the fastest is asked of it, and kept there.

    Returns what the pipeline wants to have trained.
    """
    device, dtype = accelerator.device, compute_dtype(accelerator.mixed_precision)
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
    home = "cpu" if _truth(config) == "host" or is_split(config, accelerator) else device
    for parameter in [*pipeline.unet.parameters(), *trainable_parameters(layers)]:
        # half-precision weights would round small updates away
        exact = id(parameter) in trained or own_precision
        there = home if id(parameter) in trained else device
        parameter.data = parameter.data.to(there, torch.float32 if exact else dtype)
    for buffer in pipeline.unet.buffers():
        buffer.data = buffer.data.to(device)
    agree = partial(the_main_one, accelerator)
    set_attention(pipeline.unet, config.attention, device, dtype, measured, agree)
    if config.fuse_unet:
        layers_that_pay = faster_layers(device)
        if is_split(config, accelerator):
            # reads its adapter's weights without calling it, and then stage 3 does not bring them together
            layers_that_pay -= {FusedLoraLinear}
        else:
            # DeepSpeed sends and flattens contiguous weights only
            pipeline.unet.to(memory_format=torch.channels_last)
        fuse_unet(pipeline.unet, layers_that_pay)
    set_recompute(pipeline.unet, config.gradient_checkpointing)
    if config.vae_slicing:
        pipeline.vae.enable_slicing()
    if config.vae_tiling:
        pipeline.vae.enable_tiling()
    if config.compile_unet:
        pipeline.unet.compile()
    return layers


def limit_memory(gpu_memory: float, device: torch.device) -> None:
    """Lets this process have so many GB of the GPU. Raises `ValueError` if CUDA alone needs them."""
    share = (gpu_memory * GB - CUDA_CONTEXT) / torch.cuda.get_device_properties(device).total_memory
    if share <= 0:
        raise ValueError(f"gpu_memory is {gpu_memory}, and CUDA alone takes {CUDA_CONTEXT / GB} GB: set more")
    # PyTorch refuses a device without an index, which means the current one
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device.index)


def trainable_parameters(layers: Any) -> list[nn.Parameter]:
    """The parameters with a gradient among a module's or a list's."""
    parameters = layers if isinstance(layers, list) else layers.parameters()
    return [p for p in parameters if p.requires_grad]


def is_split(config: DDPOConfig, accelerator: Accelerator) -> bool:
    """Whether DeepSpeed trains, as the settings or `accelerate launch` ask for."""
    return config.uses_deepspeed or getattr(accelerator.state, "deepspeed_plugin", None) is not None


def make_engine(
    pipeline: Any,
    trained: list[nn.Parameter],
    make_optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
    config: DDPOConfig,
    accelerator: Accelerator,
) -> Engine | ZeroEngine:
    """What turns losses into weights: DeepSpeed's ZeRO if the settings, or accelerate's own, name it."""
    # a pipeline with an autocast of its own computes in that, from fp32 weights
    own_precision = pipeline.autocast is not None
    if is_split(config, accelerator):
        precision = "no" if own_precision else accelerator.mixed_precision
        given = None if config.uses_deepspeed else accelerator.state.deepspeed_plugin.deepspeed_config
        settings = zero_settings(config, precision, given)
        prepare_communication(accelerator)
        return ZeroEngine(accelerator, pipeline.unet, trained, make_optimizer, settings, config)
    weights = MasterWeights(
        trained,
        torch.float32 if own_precision else compute_dtype(accelerator.mixed_precision),
        accelerator.device,
        _truth(config),
        None if config.train_gradient_dtype == "half" else torch.float32,
    )
    return Engine(accelerator, make_optimizer(weights.masters), weights, config)


def _truth(config: DDPOConfig) -> Truth:
    if config.stochastic_rounding:
        return "copies"
    return "host" if config.offload != "none" and not config.uses_deepspeed else "device"
