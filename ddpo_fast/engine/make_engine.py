"""Chooses a run's engine and where its weights are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine.local import LocalEngine
from ddpo_fast.engine.master_weights import ExactWeights, MasterWeights
from ddpo_fast.engine.protocol import Engine
from ddpo_fast.engine.zero import ZeroEngine
from ddpo_fast.engine.zero_settings import accelerate_settings, prepare_communication, zero_settings

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def compute_dtype(mixed_precision: str) -> torch.dtype:
    """The dtype that networks compute in with `mixed_precision` 'no', 'fp16' or 'bf16'."""
    return DTYPES[mixed_precision]


def exact_weights(config: DDPOConfig) -> ExactWeights:
    """Where a local engine keeps the fp32 weights that the optimizer trains (see `MasterWeights`)."""
    if config.stochastic_rounding:
        return "none"
    # DeepSpeed moves its own weights to host memory, so the local engine's setting stays "device"
    return "host" if config.offload != "none" and not config.uses_deepspeed else "device"


def make_engine(
    network: nn.Module,
    trained: list[nn.Parameter],
    make_optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
    precision: str,
    config: DDPOConfig,
    accelerator: Accelerator,
) -> Engine:
    """The engine that the settings ask for: DeepSpeed's ZeRO, or the local one.

    Args:
        network: the network that the `trained` parameters belong to.
        trained: in fp32.
        make_optimizer: makes an optimizer of the parameters that it is given. These are not always `trained`: with
            mixed precision they are fp32 master weights.
        precision: what the network computes in, 'no', 'fp16' or 'bf16'.
    """
    if config.uses_deepspeed:
        given = accelerate_settings(accelerator) if config.launched_with_deepspeed else None
        settings = zero_settings(config, precision, given)
        prepare_communication(accelerator)
        return ZeroEngine(accelerator, network, trained, make_optimizer, settings, config)
    weights = MasterWeights(
        trained,
        compute_dtype(precision),
        accelerator.device,
        exact_weights(config),
        None if config.train_gradient_dtype == "half" else torch.float32,
    )
    return LocalEngine(accelerator, make_optimizer(weights.masters), weights, config)
