"""AdamW, its learning rate, and its step: on all weights in place, or on a bucket of weights at a time.

The step in host memory is in offload.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine.host_adamw import HostAdamW8bit
from ddpo_fast.engine.master_weights import MasterWeights

# The most elements of a message between processes, and of the temporary fp32 copies of a step (100 MB in fp32). Small
# buckets would waste time, as each message and each call of the optimizer has a fixed cost; large ones take memory.
BUCKET = 25_000_000


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: DDPOConfig) -> torch.optim.Optimizer:
    """AdamW over `parameters`: PyTorch's, or with 8-bit states bitsandbytes' on a device and ours in host memory.

    Raises `ImportError` if bitsandbytes is needed and missing.
    """
    parameters = list(parameters)
    optimizer_class: Any = torch.optim.AdamW
    # one kernel for many tensors, which reads and writes each weight, gradient and moment once
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


class LearningRate:
    """The learning rate of each update: the one that the optimizer was made with, times `share` and `factor`.

    `factor` is 1 unless a bounded update changes it (ddpo_fast/bounded_update.py), and `shrunk` unless the reward fell
    (ddpo_fast/guard.py).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: DDPOConfig) -> None:
        self.optimizer = optimizer
        self.warmup = max(1, config.train_warmup_steps)
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.factor = self.shrunk = 1.0
        # The schedule is diffusers' function of the update's number; the optimizer that it wants is only read.
        unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        after_warmup = max(1, config.num_updates - config.train_warmup_steps)
        scheduler: Any = get_scheduler(
            config.train_lr_scheduler, unused, num_warmup_steps=0, num_training_steps=after_warmup
        )
        self._schedule, self._last = scheduler.lr_lambdas[0], after_warmup - 1

    def share(self, updates: int) -> float:
        """What warm-up, schedule and `shrunk` make of the rate in the update after `updates` updates, from 0 to 1."""
        # updates + 1, so that the first update has a learning rate above zero
        rising = min(1.0, (updates + 1) / self.warmup)
        # a run may be continued beyond the `num_epochs` that it was planned for: it keeps the last rate
        return rising * self._schedule(min(max(0, updates + 1 - self.warmup), self._last)) * self.shrunk

    def shrink(self, share: float) -> None:
        """Multiplies the learning rates, and the targets of bounded updates, from the next update on."""
        self.shrunk *= share
        for group in self.optimizer.param_groups:
            group["lr"] *= share

    def set_for(self, updates: int) -> None:
        """Sets the optimizer's learning rates for the update after `updates` updates."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.share(updates) * self.factor


def buckets(sizes: Iterable[int]) -> Iterator[list[int]]:
    """Groups tensors, given by their numbers of elements, in order: yields the indices of each group.

    A group has at most `BUCKET` elements, or is a single larger tensor.
    """
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
    """One call of the optimizer for all weights: fp32 masters and fp32 gradients, both on the device.

    Args:
        multiplier: [], clips and unscales the gradients, which are multiplied by it in place.
    """
    gradients = [gradient for gradient in weights.gradients if gradient is not None]
    torch._foreach_mul_(gradients, multiplier)
    for master, gradient in zip(weights.masters, weights.gradients, strict=True):
        master.grad = gradient
    optimizer.step()
    # without copies the masters are the network's parameters, whose gradients `clear_gradients` discards or zeroes
    if weights.has_copies:
        for master in weights.masters:
            master.grad = None


def step_in_buckets(
    optimizer: torch.optim.Optimizer,
    weights: MasterWeights,
    multiplier: Tensor,
    generator: torch.Generator,
    only_these: Sequence[int] | None = None,
) -> None:
    """One update in several calls of the optimizer, so that fp32 copies exist of only one bucket at a time.

    fp32 copies are needed of half-precision masters, and of gradients: these are multiplied by `multiplier`, while the
    originals must not change. During the call the masters' data are replaced by flat tensors, because bitsandbytes'
    optimizers call `p.data.contiguous()`, which would turn channels_last weights into contiguous ones for good.

    Args:
        multiplier: [], clips and unscales the gradients, which are not changed.
        generator: draws the random numbers of stochastic rounding, if the masters are bf16.
        only_these: indices of the parameters to update (default: all that have a gradient).
    """
    chosen = range(len(weights.masters)) if only_these is None else only_these
    gradients = weights.gradients
    for bucket in buckets(weights.masters[i].numel() for i in chosen):
        members = [chosen[i] for i in bucket if gradients[chosen[i]] is not None]
        masters = [weights.masters[i] for i in members]
        stored_weights = [master.data for master in masters]
        # CUDA graphs write to the memory of these tensors, so the same tensors are put back afterwards
        stored_gradients = [master.grad for master in masters]
        for i, master, stored in zip(members, masters, stored_weights, strict=True):
            gradient = gradients[i]
            assert gradient is not None
            master.grad = None
            # A view of the stored weights if they are fp32: the optimizer then updates them directly. Set before the
            # gradient, as PyTorch checks on assignment that a gradient has the data's shape and dtype.
            master.data = flat(stored).float()
            master.grad = flat(gradient, like=stored).float() * multiplier
        with only_parameters(optimizer, masters):
            optimizer.step()
        for master, stored, stored_gradient in zip(masters, stored_weights, stored_gradients, strict=True):
            if stored.dtype != torch.float32:
                flat(stored).copy_(rounded_stochastically(master.data, generator))
            master.grad = None
            master.data = stored
            master.grad = stored_gradient


@contextmanager
def only_parameters(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """A context in which the optimizer's groups contain only these parameters.

    The other parameters have no gradient, so a step would skip them anyway, but it would have to look at each of them
    for each bucket.
    """
    chosen = {id(p) for p in parameters}
    all_of_group = [group["params"] for group in optimizer.param_groups]
    for group, members in zip(optimizer.param_groups, all_of_group, strict=True):
        group["params"] = [p for p in members if id(p) in chosen]
    try:
        yield
    finally:
        for group, members in zip(optimizer.param_groups, all_of_group, strict=True):
            group["params"] = members


def flat(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """A dense tensor's elements in the order in which they lie in memory, [N].

    For a channels_last weight [out, in, height, width] that is the order out, height, width, in. The optimizers here
    compute elementwise, so any order will do, as long as weight, gradient and moments have the same one.

    Args:
        like: the tensor whose memory order is used (default: `tensor`). The result is a view if `tensor` has the same
            order, else a copy.
    """
    tensor = tensor.detach()
    if like is not None and tensor.stride() != like.stride():
        tensor = torch.empty_like(like, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    # a dense tensor has no gaps, so a single dimension of stride 1 covers its memory
    return tensor.as_strided((tensor.numel(),), (1,))


def rounded_stochastically(exact: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 rounded to one of the two nearest bf16 numbers at random, such that the expected value is `exact`.

    The probability of rounding up must be how far `exact` lies on the way from the lower to the upper bf16 number. bf16
    has the upper 16 bits of fp32, so the lower 16 bits are that fraction, in units of 1/65536. Adding a uniform random
    number of 16 bits carries into the upper half with exactly this probability; the lower half is then set to zero. The
    bits of an fp32 number, read as an integer, grow with its magnitude, so the method is also right across powers of
    two and for both signs. Infinity and NaN are kept.
    """
    noise = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator)
    bits = noise.add_(exact.view(torch.int32)).bitwise_and_(-(1 << 16))
    return torch.where(exact.isfinite(), bits.view(torch.float32), exact).to(torch.bfloat16)
