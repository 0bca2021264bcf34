"""From losses to weights: loss scaling, the sum over processes, clipping and the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from ddpo_fast.config import DDPOConfig
from ddpo_fast.master_weights import MasterWeights

# elements of an all-reduce: each message costs its way through all processes, and 100 MB hide that
BUCKET = 25_000_000
COMPUTE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    return COMPUTE_DTYPES.get(accelerator.mixed_precision, torch.float32)


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: DDPOConfig) -> torch.optim.Optimizer:
    """AdamW over `parameters`; bitsandbytes' 8-bit one if the config says so."""
    optimizer_class: Any = torch.optim.AdamW
    options: dict[str, Any] = {"fused": True}
    if config.train_use_8bit_adam:
        import bitsandbytes

        optimizer_class, options = bitsandbytes.optim.AdamW8bit, {}
    return optimizer_class(
        parameters,
        lr=config.train_learning_rate,
        betas=(config.train_adam_beta1, config.train_adam_beta2),
        weight_decay=config.train_adam_weight_decay,
        eps=config.train_adam_epsilon,
        **options,
    )


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors in order, in groups of at most `BUCKET` elements, or of one that is larger."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


class Engine:
    """Owns backward and step. What the optimizer trains is fp32 whatever the precision of the forward pass.

    Gradients are summed over micro-batches and averaged over processes once per update, so the forward may use the
    bare UNet and no wrapper can be bypassed.

    Args:
        weights: the trained weights; `optimizer` trains its masters.
    """

    def __init__(
        self, accelerator: Accelerator, optimizer: torch.optim.Optimizer, weights: MasterWeights, config: DDPOConfig
    ) -> None:
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.weights = weights
        self.max_grad_norm = config.train_max_grad_norm
        self.warmup_steps = config.train_warmup_steps
        # recorded graphs write to the gradients where they were
        self.keeps_gradients = config.cuda_graphs
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.updates = 0
        self.zero = torch.zeros((), device=accelerator.device)
        self._peak_rates = [group["lr"] for group in optimizer.param_groups]
        self._scaler = torch.amp.GradScaler(
            accelerator.device.type, enabled=accelerator.mixed_precision == "fp16", init_scale=2.0**16
        )
        if self.keeps_gradients:
            self._fill_gradients()
        if accelerator.num_processes > 1:
            for parameter in self.parameters:
                dist.broadcast(parameter.data, src=0)

    def computing(self) -> AbstractContextManager[None]:
        """The network's trained weights are in the compute precision."""
        return self.weights.computing()

    def loss_scale(self) -> torch.Tensor:
        """What losses are multiplied by before a backward pass, [] on the device: 1 except for fp16."""
        return self._scaler.scale(self.zero + 1)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss`, which carries its share of the update's pairs already."""
        self._scaler.scale(loss).backward()

    def step(self) -> torch.Tensor:
        """One update from the gradients since the last one; returns their norm before clipping."""
        # the scaler makes its scale when it is first asked for one, and an update may have had nothing to scale
        self.loss_scale()
        self._average_over_processes()
        self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        for group, rate in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = rate * min(1.0, (self.updates + 1) / max(1, self.warmup_steps))
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.zero_gradients()
        self.weights.refresh()
        self.updates += 1
        return norm

    def bytes_to_come(self) -> int:
        """What the first update will allocate: gradients and Adam's two moments, unless they are there."""
        weights = sum(parameter.numel() for parameter in self.parameters)
        gradients = 0 if self.keeps_gradients else 4
        return weights * (gradients + (0 if self.optimizer.state else 8))

    def zero_gradients(self) -> None:
        """Forgets the gradients since the last update, or sets them to zero where they must stay in place."""
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)

    def _average_over_processes(self) -> None:
        many = self.accelerator.num_processes > 1
        # with several processes all must have something to add; no gradient at all means a step on zero
        if many or all(parameter.grad is None for parameter in self.parameters):
            self._fill_gradients()
        if not many:
            return
        for grads in _buckets([parameter.grad for parameter in self.parameters if parameter.grad is not None]):
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            flat /= self.accelerator.num_processes
            parts = flat.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [part.view(grad.shape) for part, grad in zip(parts, grads, strict=True)])

    def _fill_gradients(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                # weights may have another layout than in the run that saved; a fused step goes by memory order
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self._scaler.load_state_dict(state["scaler"])
        self.updates = state["updates"]
