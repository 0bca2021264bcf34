"""Which optimizer trains, and one step of it: in place, a bucket at a time, or in host memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine.host_adamw import HostAdamW8bit
from ddpo_fast.engine.master_weights import MasterWeights

# elements of a message or of a temporary copy: each costs its way, and 100 MB hide that
BUCKET = 25_000_000


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: DDPOConfig) -> torch.optim.Optimizer:
    """AdamW over `parameters`: with 8-bit states if the config says so, in host memory if that is where they are.

    Raises `ImportError` if bitsandbytes is needed and missing.
    """
    parameters = list(parameters)
    optimizer_class: Any = torch.optim.AdamW
    options: dict[str, Any] = {"fused": True}
    if config.train_use_8bit_adam:
        options = {"min_8bit_size": config.train_min_8bit_size}
        if config.offload != "none":
            optimizer_class = HostAdamW8bit
        else:
            import bitsandbytes

            optim = bitsandbytes.optim
            optimizer_class = optim.PagedAdamW8bit if config.train_paged_adam else optim.AdamW8bit
    return optimizer_class(
        parameters,
        lr=config.train_learning_rate,
        betas=(config.train_adam_beta1, config.train_adam_beta2),
        weight_decay=config.train_adam_weight_decay,
        eps=config.train_adam_epsilon,
        **options,
    )


class Warmup:
    """Learning rates that rise linearly to those that the optimizer was made with, over `steps` updates."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.optimizer = optimizer
        self.steps = steps
        self.peaks = [group["lr"] for group in optimizer.param_groups]

    def set_rate(self, updates: int) -> None:
        """For the update after so many."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * min(1.0, (updates + 1) / max(1, self.steps))


def buckets(sizes: Iterable[int]) -> Iterator[list[int]]:
    """The indices of tensors with these sizes in order, in groups of at most `BUCKET` elements, or of a larger one."""
    bucket: list[int] = []
    total = 0
    for i, size in enumerate(sizes):
        if bucket and total + size > BUCKET:
            yield bucket
            bucket, total = [], 0
        bucket.append(i)
        total += size
    if bucket:
        yield bucket


def step_in_place(optimizer: torch.optim.Optimizer, weights: MasterWeights, multiplier: Tensor) -> None:
    """A step on fp32 weights from fp32 gradients, both on the device, times `multiplier`."""
    gradients = [gradient for gradient in weights.gradients if gradient is not None]
    torch._foreach_mul_(gradients, multiplier)
    for master, gradient in zip(weights.masters, weights.gradients, strict=True):
        master.grad = gradient
    optimizer.step()
    if not weights.is_one_set:
        for master in weights.masters:
            master.grad = None


def step_in_buckets(
    optimizer: torch.optim.Optimizer,
    weights: MasterWeights,
    multiplier: Tensor,
    random: torch.Generator,
    only_these: Sequence[int] | None = None,
) -> None:
    """A step on weights whose fp32 values or gradients exist for a bucket at a time only.

    Optimizers see flat tensors in the order of memory: bitsandbytes would make all others contiguous for good.

    Args:
        random: rounds weights that have no fp32 truth.
        only_these: parameters to update (default: all).
    """
    chosen = range(len(weights.masters)) if only_these is None else only_these
    gradients = weights.gradients
    for bucket in buckets(weights.masters[i].numel() for i in chosen):
        members = [chosen[i] for i in bucket if gradients[chosen[i]] is not None]
        homes = [weights.masters[i].data for i in members]
        # the network's own gradients may have to stay where they are
        own = [weights.masters[i].grad for i in members]
        for i, home in zip(members, homes, strict=True):
            gradient = gradients[i]
            assert gradient is not None
            weights.masters[i].grad = None
            weights.masters[i].data = flat(home).float()
            weights.masters[i].grad = flat(gradient, like=home).float() * multiplier
        with training_only(optimizer, [weights.masters[i] for i in members]):
            optimizer.step()
        for i, home, gradient in zip(members, homes, own, strict=True):
            master = weights.masters[i]
            if home.dtype != torch.float32:
                flat(home).copy_(rounded_stochastically(master.data, random))
            master.grad = None
            master.data = home
            master.grad = gradient


@contextmanager
def training_only(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """The optimizer knows of some of its parameters only: looking at all of them for each bucket takes longer."""
    chosen = {id(p) for p in parameters}
    whole = [group["params"] for group in optimizer.param_groups]
    for group, members in zip(optimizer.param_groups, whole, strict=True):
        group["params"] = [p for p in members if id(p) in chosen]
    try:
        yield
    finally:
        for group, members in zip(optimizer.param_groups, whole, strict=True):
            group["params"] = members


def flat(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """A dense tensor's elements in the order of memory, [N]: a view, or a copy if `like` has another order."""
    tensor = tensor.detach()
    if like is not None and tensor.stride() != like.stride():
        tensor = torch.empty_like(like, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def rounded_stochastically(exact: Tensor, random: torch.Generator) -> Tensor:
    """bf16 of fp32, up or down with the probabilities that make it right on average: its upper half after adding dice.

    Infinity and NaN stay what they are.
    """
    dice = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=random)
    bits = dice.add_(exact.view(torch.int32)).bitwise_and_(-(1 << 16))
    return torch.where(exact.isfinite(), bits.view(torch.float32), exact).to(torch.bfloat16)
