"""Moves a pipeline's networks to their device and precision, and sets up the UNet's layers by the settings."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import T5EncoderModel

from ddpo_fast.config import DDPOConfig
from ddpo_fast.cpu_speed import fastest_threads, layers
from ddpo_fast.device_memory import limit_memory
from ddpo_fast.engine import compute_dtype, exact_weights
from ddpo_fast.families import family_of_pipeline
from ddpo_fast.measured import Measured
from ddpo_fast.offload_frozen import leave_as_loaded, offload
from ddpo_fast.processes import broadcast_from_main
from ddpo_fast.quantize_frozen import quantize_linears
from ddpo_fast.unet import (
    FusedLoraLinear,
    compile_blocks,
    faster_layers,
    fuse_unet,
    set_attention,
    set_gradient_checkpointing,
)


def fitting_threads(pipeline: Any, config: DDPOConfig, accelerator: Accelerator) -> int:
    """The number of CPU threads of a run: the fastest for its networks on a CPU, PyTorch's own where a GPU computes."""
    if accelerator.device.type != "cpu":
        return torch.get_num_threads()
    _, height, width = family_of_pipeline(pipeline).latent_shape
    rows = config.sample_batch_size * config.rows_per_pair
    return broadcast_from_main(accelerator, fastest_threads(layers(rows, height, width)))


def place_networks(
    pipeline: Any, config: DDPOConfig, accelerator: Accelerator, measured: Measured | None = None
) -> Any:
    """Moves the networks to the device: frozen weights in the compute precision, trained ones in fp32.

    Args:
        measured: keeps which attention kernel was the fastest.

    Returns the module, or the list of parameters, that is trained, from the pipeline's `get_trainable_layers`.
    """
    device, dtype = accelerator.device, compute_dtype(config.mixed_precision)
    if device.type == "cuda":
        choose_libraries(config)
        if config.gpu_memory is not None:
            limit_memory(config.gpu_memory, device)

    # The VAE and the text encoders are frozen. Without updates most need no fp32, and with `offload_frozen` they take
    # no device memory while they are idle.
    family = family_of_pipeline(pipeline)
    quantizes = config.quantize_frozen != "none"
    for name, frozen in family.frozen_parts.items():
        own_dtype = family.dtype_of(name, getattr(frozen, "config", {}), dtype)
        idle = config.offload_frozen or (config.embed_prompts_once and name != "vae")
        if quantizes and isinstance(frozen, T5EncoderModel):
            quantize_linears(frozen, config.quantize_frozen, "cpu" if idle else device, own_dtype)
        if config.embed_prompts_once and name != "vae":
            leave_as_loaded(frozen, own_dtype)
        elif config.offload_frozen:
            offload(frozen, own_dtype)
        else:
            frozen.to(device, dtype=own_dtype)

    # The UNet's trained weights stay in fp32, as updates are often smaller than half precision can resolve. They are in
    # host memory if the engine keeps them there, and under DeepSpeed, which casts them before it moves them to the
    # device.
    layers = pipeline.get_trainable_layers()
    trained = {id(parameter) for parameter in trainable_parameters(layers)}
    if quantizes:
        # before the weights are rounded to the compute precision
        quantize_linears(pipeline.unet, config.quantize_frozen, device, dtype)
    home = "cpu" if exact_weights(config) == "host" or config.uses_deepspeed else device
    for parameter in [*pipeline.unet.parameters(), *trainable_parameters(layers)]:
        is_trained = id(parameter) in trained
        # a pipeline with an autocast of its own casts weights in each operation, from fp32
        in_fp32 = is_trained or pipeline.autocast is not None
        parameter.data = parameter.data.to(home if is_trained else device, torch.float32 if in_fp32 else dtype)
    for buffer in pipeline.unet.buffers():
        buffer.data = buffer.data.to(device)

    # `agree` gives all processes the main one's choice
    agree = partial(broadcast_from_main, accelerator)
    set_attention(pipeline.unet, config.attention, device, dtype, measured, agree)
    set_up_layers(pipeline, config, device)
    return layers


def set_up_layers(pipeline: Any, config: DDPOConfig, device: torch.device) -> None:
    """Fuses, checkpoints and compiles layers of the trained network, and slices the VAE's work, by the settings."""
    if config.fuse_unet:
        layers_that_pay = faster_layers(device)
        if config.uses_deepspeed:
            # This layer reads its adapter's weights without calling the adapter's modules, whose calls are what ZeRO's
            # stage 3 gathers weights for.
            layers_that_pay -= {FusedLoraLinear}
        else:
            # not under DeepSpeed, which flattens and sends contiguous weights only
            pipeline.unet.to(memory_format=torch.channels_last)
        fuse_unet(pipeline.unet, layers_that_pay)
    set_gradient_checkpointing(pipeline.unet, config.gradient_checkpointing)
    if config.vae_slicing:
        pipeline.vae.enable_slicing()
    if config.vae_tiling:
        pipeline.vae.enable_tiling()
    if config.compile_unet:
        compile_blocks(pipeline.unet)


def choose_libraries(config: DDPOConfig) -> None:
    """Sets what cuBLAS and cuDNN may choose from."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    # cuDNN times its convolutions for each size of input and keeps the fastest. There are few sizes: sampling calls
    # have one number of rows; those of training have that of a micro-batch, or are padded to a power of two. A process
    # that asked for the same bits in every run keeps what cuDNN takes untimed.
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic


def compute_precision(pipeline: Any, config: DDPOConfig) -> str:
    """What the trained network computes in: 'no', 'fp16' or 'bf16'.

    A pipeline with an autocast of its own computes in that, from weights in fp32.
    """
    return "no" if pipeline.autocast is not None else config.mixed_precision


def trainable_parameters(layers: Any) -> list[nn.Parameter]:
    """The parameters of a module, or of a list, that require a gradient."""
    parameters = layers if isinstance(layers, list) else layers.parameters()
    return [p for p in parameters if p.requires_grad]
