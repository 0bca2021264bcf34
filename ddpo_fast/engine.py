"""From losses to weights: precision, gradient accumulation, the sum over processes, clipping and the optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from ddpo_fast.config import DDPOConfig

COMPUTE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    return COMPUTE_DTYPES.get(accelerator.mixed_precision, torch.float32)


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: DDPOConfig) -> torch.optim.Optimizer:
    """AdamW over `parameters`; bitsandbytes' 8-bit one if the config says so."""
    optimizer_class: Any = torch.optim.AdamW
    if config.train_use_8bit_adam:
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    return optimizer_class(
        parameters,
        lr=config.train_learning_rate,
        betas=(config.train_adam_beta1, config.train_adam_beta2),
        weight_decay=config.train_adam_weight_decay,
        eps=config.train_adam_epsilon,
    )


class Engine:
    """Owns backward and step. The parameters are fp32 whatever the precision of the forward pass.

    Gradients are summed over micro-batches and averaged over processes once per update, so the forward may use the
    bare UNet and no wrapper can be bypassed.
    """

    def __init__(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer, config: DDPOConfig) -> None:
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.max_grad_norm = config.train_max_grad_norm
        self.warmup_steps = config.train_warmup_steps
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.updates = 0
        self._peak_rates = [group["lr"] for group in optimizer.param_groups]
        self._scaler = torch.amp.GradScaler(
            accelerator.device.type, enabled=accelerator.mixed_precision == "fp16", init_scale=2.0**16
        )
        if accelerator.num_processes > 1:
            for parameter in self.parameters:
                dist.broadcast(parameter.data, src=0)

    def autocast(self) -> AbstractContextManager[Any]:
        """Half-precision compute over fp32 weights; nothing for fp32."""
        dtype = compute_dtype(self.accelerator)
        return torch.autocast(self.accelerator.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def loss_scale(self) -> torch.Tensor | None:
        """What `backward` multiplies a loss by, [] on the device; None if nothing."""
        if not self._scaler.is_enabled():
            return None
        return self._scaler.scale(torch.ones((), device=self.accelerator.device))

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss`, which carries its share of the update's pairs already."""
        self._scaler.scale(loss).backward()

    def step(self) -> torch.Tensor:
        """One update from the gradients since the last one; returns their norm before clipping."""
        self._average_over_processes()
        self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        for group, rate in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = rate * min(1.0, (self.updates + 1) / max(1, self.warmup_steps))
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norm

    def _average_over_processes(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.accelerator.num_processes

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.updates = state["updates"]
