"""Which engine a run has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine.local import LocalEngine
from ddpo_fast.engine.master_weights import MasterWeights, Truth
from ddpo_fast.engine.protocol import Engine
from ddpo_fast.engine.zero import ZeroEngine
from ddpo_fast.engine.zero_settings import accelerate_settings, prepare_communication, zero_settings

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def compute_dtype(mixed_precision: str | None) -> torch.dtype:
    """What networks compute in under a setting of `mixed_precision`."""
    return DTYPES[mixed_precision or "no"]


def make_engine(
    network: nn.Module,
    trained: list[nn.Parameter],
    make_optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
    precision: str | None,
    config: DDPOConfig,
    accelerator: Accelerator,
) -> Engine:
    """The engine that the settings name: DeepSpeed's ZeRO, or the local one.

    Args:
        network: has the `trained` parameters, in fp32.
        make_optimizer: makes the optimizer of the parameters that the engine gives it.
        precision: what the network computes in, 'no', 'fp16' or 'bf16'.
    """
    if config.uses_deepspeed:
        given = accelerate_settings(accelerator) if config.launched_with_deepspeed else None
        settings = zero_settings(config, precision or "no", given)
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


def exact_weights(config: DDPOConfig) -> Truth:
    """Where the weights that the optimizer trains are."""
    if config.stochastic_rounding:
        return "copies"
    return "host" if config.offload != "none" and not config.uses_deepspeed else "device"
