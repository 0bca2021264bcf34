"""The engine for weights on one device or in its host's memory; several processes average their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine import moments
from ddpo_fast.engine.ema import EMA
from ddpo_fast.engine.from_main import copy_from_main
from ddpo_fast.engine.loss_scale import LossScale
from ddpo_fast.engine.master_weights import MasterWeights
from ddpo_fast.engine.offload import Offload
from ddpo_fast.engine.optimizers import (
    LearningRate,
    buckets,
    flat,
    rounded_stochastically,
    step_in_buckets,
    step_in_place,
)
from ddpo_fast.temporary_values import temporary_values


class LocalEngine:
    """An `Engine` (protocol.py documents its methods) in which each process has all weights.

    Args:
        optimizer: trains `weights.masters`.
        weights: the trained weights.
    """

    def __init__(
        self, accelerator: Accelerator, optimizer: torch.optim.Optimizer, weights: MasterWeights, config: DDPOConfig
    ) -> None:
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.weights = weights
        self.config = config
        self.keeps_gradients = False
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.updates = 0
        self.rate = LearningRate(optimizer, config)
        self._scale = LossScale(accelerator.device, config.mixed_precision == "fp16")
        self._generator = torch.Generator(accelerator.device)
        self._offload = Offload(optimizer, weights) if weights.exact_weights == "host" else None
        if config.cuda_graphs:
            self.keep_gradients()
        if accelerator.num_processes > 1:
            copy_from_main([master.data for master in weights.masters], accelerator)
            self.weights.refresh()
        on_host = config.ema_device == "cpu"
        self.ema = EMA(weights.masters, config.ema_decay, on_host) if config.ema_decay else None
        if config.optimizer_in_backward:
            self._update_in_backward()
        self.rate.set_for(self.updates)

    def computing(self) -> AbstractContextManager[None]:
        return self.weights.computing()

    def exact(self, write: bool = False) -> AbstractContextManager[None]:
        # outside of `computing` the network's parameters are the fp32 weights, on every process
        return nullcontext()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        assert self.ema is not None
        with temporary_values(self.weights.parameters, self.ema.averages):
            yield

    def computing_averages(self) -> AbstractContextManager[None]:
        assert self.ema is not None
        return self.weights.computing_with(self.ema.averages)

    @property
    def can_begin_again(self) -> bool:
        # if the optimizer runs in the backward pass, weights have changed already before the backward pass fails
        return not self.config.optimizer_in_backward

    # gradients

    def loss_scale(self) -> Tensor:
        return self._scale.value

    def backward(self, loss: Tensor) -> None:
        (loss * self.loss_scale().to(loss.dtype)).backward()

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        output.backward(gradient)

    def keep_gradients(self) -> None:
        self.keeps_gradients = True
        self.weights.fill_gradients(self._gradient_dtype)

    def zero_gradients(self) -> None:
        """Discards the gradients since the last update, or sets them to zero in place if CUDA graphs write to them."""
        self.weights.clear_gradients(keep=self.keeps_gradients)

    def forward_passes(self, mine: int) -> int:
        # forward passes do not communicate
        return mine

    # one update

    def step(self, settle: Callable[[], float] | None = None) -> dict[str, Tensor]:
        self.updates += 1
        if self.config.optimizer_in_backward:
            # the hooks of the backward pass have updated the weights already
            self.weights.refresh()
            if settle is not None:
                settle()
            if self.ema is not None:
                self.ema.update(self.weights.masters)
            self.rate.set_for(self.updates)
            return {}
        self._average_over_processes()
        norm, multiplier = self._clip()
        # If the norm is not finite, then some gradient is not. With a loss scale that means an overflow. Without one
        # the run itself has a fault, which health.py reports from the logged norm.
        overflowed = ~norm.isfinite() & self._scale.enabled
        before = [master.detach().clone() for master in self.weights.masters] if settle is not None else []
        self._apply(multiplier, overflowed)
        while settle is not None and (share := settle()) != 1:
            self._scale_update(before, share)
        if self.ema is not None:
            self.ema.update(self.weights.masters, overflowed if self._scale.enabled else None)
        logged = {"grad_norm": norm}
        if self._scale.enabled:
            logged |= {"skipped_step": overflowed.float(), "loss_scale": self._scale.value.clone()}
        self._scale.update(overflowed)
        self.rate.set_for(self.updates)
        return logged

    def _clip(self) -> tuple[Tensor, Tensor]:
        """(the norm of all gradients without the loss scale, what they are to be multiplied by), both [].

        The multiplier removes the loss scale. If the norm exceeds `train_max_grad_norm`, the multiplier also reduces
        the norm to that value, with the 1e-6 of `torch.nn.utils.clip_grad_norm_`. Each kind of step applies the
        multiplier where it reads the gradients: in place, to a bucket's fp32 copies, or on the host.
        """
        gradients = [gradient for gradient in self.weights.gradients if gradient is not None]
        norm = _norm(gradients) / self._scale.value
        multiplier = (self.config.train_max_grad_norm / (norm + 1e-6)).clamp(max=1.0) / self._scale.value
        return norm, multiplier

    def _apply(self, multiplier: Tensor, overflowed: Tensor) -> None:
        """Runs the optimizer, discards the gradients, and updates the half-precision copies.

        If a gradient overflowed, it discards the gradients and changes no weights.
        """
        if self._scale.enabled:
            if self._steps_in_place:
                # PyTorch's fused AdamW takes this flag from its attribute and reads the value on the device, so that
                # the host need not wait to know whether the update is skipped
                self.optimizer.found_inf = overflowed.float()  # type: ignore[attr-defined]
            elif overflowed.item():
                self.zero_gradients()
                return
        if self._steps_in_place:
            step_in_place(self.optimizer, self.weights, multiplier)
            self.zero_gradients()
            self.weights.refresh()
        elif self._offload is not None:
            self._offload.step(multiplier.item())
            self.zero_gradients()
        else:
            step_in_buckets(self.optimizer, self.weights, multiplier, self._rounding_generator())
            self.zero_gradients()
            self.weights.refresh()

    @torch.no_grad()
    def _scale_update(self, before: Sequence[Tensor], share: float) -> None:
        """Multiplies an update by `share`, given the weights `before` it: Adam's step with `share` times its rate."""
        masters = [master.detach() for master in self.weights.masters]
        if self.weights.exact_weights != "none":
            torch._foreach_lerp_(masters, list(before), 1 - share)
        else:
            # weights in half precision alone: rounded at random, as a part of a step may be too small to be stored
            generator = self._rounding_generator(len(masters))
            for master, old in zip(masters, before, strict=True):
                exact = torch.lerp(master.float(), old.float(), 1 - share)
                flat(master).copy_(rounded_stochastically(flat(exact, like=master), generator))
        self.weights.refresh()

    def forget_direction(self) -> None:
        moments.forget_direction(self.optimizer)

    @property
    def _steps_in_place(self) -> bool:
        """Whether one call of the optimizer can update all weights in place, see `step_in_place`."""
        fp32_on_device = self.weights.exact_weights == "device" and self._gradient_dtype == torch.float32
        # bitsandbytes' optimizers, recognised by this method, make weights contiguous, see `step_in_buckets`
        keeps_layout = not hasattr(self.optimizer, "init_state")
        can_skip = getattr(self.optimizer, "_step_supports_amp_scaling", False) or not self._scale.enabled
        return fp32_on_device and keeps_layout and can_skip

    @property
    def _gradient_dtype(self) -> torch.dtype:
        return self.weights.dtype if self.config.train_gradient_dtype == "half" else torch.float32

    def _rounding_generator(self, i: int = 0) -> torch.Generator:
        """The random numbers of this update's stochastic rounding, or of that of one parameter with index `i`.

        The seed depends on the run's seed, the update and `i` only. So all processes round in the same way and keep the
        same weights, and a resumed run rounds as an uninterrupted one does. The factors 1,000,003 and 10,007 give
        different updates and parameters different seeds.
        """
        return self._generator.manual_seed(((self.config.seed * 1_000_003 + self.updates) * 10_007 + i) % 2**63)

    def _update_in_backward(self) -> None:
        """Has each parameter updated as soon as a backward pass has its gradient, which is then freed."""
        for i, parameter in enumerate(self.weights.parameters):
            # Hooks run in the order of registration: the hook of MasterWeights comes first and converts the gradient to
            # the accumulation dtype.
            parameter.register_post_accumulate_grad_hook(lambda _, i=i: self._update_one(i))

    @torch.no_grad()
    def _update_one(self, i: int) -> None:
        # no clipping: the norm of all gradients is known only after the last of them
        step_in_buckets(self.optimizer, self.weights, 1 / self._scale.value, self._rounding_generator(i), [i])
        self.weights.set_gradient(i, None)

    # processes

    def _average_over_processes(self) -> None:
        """Replaces the gradients by their mean over processes, and missing gradients by zeros."""
        several = self.accelerator.num_processes > 1
        # Every process must take part in the all-reduce with the same tensors, whichever of its own gradients are
        # missing. On one process, an update that has no gradient at all becomes a step with gradients of zero: Adam's
        # mean of earlier gradients still moves the weights then, as it would on several processes.
        if several or all(gradient is None for gradient in self.weights.gradients):
            self.weights.fill_gradients(self._gradient_dtype)
        if not several:
            return
        gradients = [gradient for gradient in self.weights.gradients if gradient is not None]
        for bucket in buckets(gradient.numel() for gradient in gradients):
            members = [gradients[i] for i in bucket]
            message = torch.cat([gradient.flatten() for gradient in members])
            # divided before they are summed: the sum of half-precision gradients may overflow
            message /= self.accelerator.num_processes
            dist.all_reduce(message)
            parts = message.split([gradient.numel() for gradient in members])
            torch._foreach_copy_(members, [part.view(g.shape) for part, g in zip(parts, members, strict=True)])

    # checkpoints

    def bytes_before_first_step(self) -> int:
        weights = sum(parameter.numel() for parameter in self.weights.parameters)
        gradients = 0 if self.keeps_gradients or self.config.optimizer_in_backward else self._gradient_dtype.itemsize
        # of a weight: two moments in 8 bits (without their scales, 1/32 byte), or in fp32
        states = 2 if self.config.train_use_8bit_adam else 8
        if self.optimizer.state or (self._offload is not None and self.accelerator.device.type == "cuda"):
            # the states exist already, or are in host memory
            states = 0
        return weights * (gradients + states)

    def state_dict(self) -> dict[str, Any]:
        if not self.accelerator.is_main_process:
            # All processes have the same state and only the main one writes it. Copying it elsewhere would waste
            # memory.
            return {}
        state: dict[str, Any] = {
            "loss_scale": self._scale.state_dict(),
            "updates": self.updates,
            "rate_factor": self.rate.factor,
            "rate_shrunk": self.rate.shrunk,
        }
        if moments.is_adam(self.optimizer):
            state["step"] = moments.step_of(self.optimizer)
            for moment in moments.MOMENTS:
                state[moment] = [
                    moments.to_checkpoint(self.optimizer, master, moment) for master in self.weights.masters
                ]
        else:
            # an optimizer of the user's, whose state only the same kind of optimizer can load
            state["optimizer"] = self.optimizer.state_dict()
        if self.ema is not None:
            state["ema"] = [average.cpu() for average in self.ema.averages]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self.rate.factor = state["updates"], state.get("rate_factor", 1.0)
        self.rate.shrunk = state.get("rate_shrunk", 1.0)
        self._scale.load_state_dict(state["loss_scale"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        elif state["step"]:
            for i, master in enumerate(self.weights.masters):
                saved = {moment: state[moment][i] for moment in moments.MOMENTS}
                data_in_step = master.data if self._steps_in_place else flat(master)
                moments.write(self.optimizer, master, saved, state["step"], data_in_step)
        if self.ema is not None:
            # the checkpoint of a run without a moving average has none: start from the weights
            self.ema.set(state.get("ema", self.weights.masters))
        self.rate.set_for(self.updates)

    def process_state(self) -> dict[str, Any]:
        # all processes have the same state
        return {}

    def load_process_state(self, saved: dict[str, Any]) -> None:
        pass


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, [], computed in fp32 (fp64 for fp64 gradients)."""
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    # the norm of the tensors' norms is that of all elements; foreach takes one launch for many tensors
    norms = torch._foreach_norm(list(gradients), 2, dtype=wide)
    return torch.linalg.vector_norm(torch.stack(list(norms)))
