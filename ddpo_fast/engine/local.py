"""The engine for weights on one device or in its host's memory; several processes average their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from ddpo_fast.config import DDPOConfig
from ddpo_fast.engine import moments
from ddpo_fast.engine.ema import EMA, holding
from ddpo_fast.engine.loss_scale import LossScale
from ddpo_fast.engine.master_weights import MasterWeights
from ddpo_fast.engine.offload import Offload
from ddpo_fast.engine.optimizers import Warmup, buckets, flat, step_in_buckets, step_in_place


class LocalEngine:
    """Owns backward and step. What the optimizer trains is exact whatever the precision of the forward pass.

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
        self.config = config
        # recorded graphs write to the gradients where they were
        self.keeps_gradients = config.cuda_graphs
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.updates = 0
        self._warmup = Warmup(optimizer, config.train_warmup_steps)
        self._scale = LossScale(accelerator.device, accelerator.mixed_precision == "fp16")
        self._random = torch.Generator(accelerator.device)
        self._offload = Offload(optimizer, weights) if weights.truth == "host" else None
        if self.keeps_gradients:
            self.weights.fill_gradients(self._gradient_dtype)
        if accelerator.num_processes > 1:
            self._broadcast()
        on_host = config.ema_device == "cpu"
        self.ema = EMA(weights.masters, config.ema_decay, on_host) if config.ema_decay else None
        if config.optimizer_in_backward:
            self._update_in_backward()
        self._warmup.set_rate(self.updates)

    def computing(self) -> AbstractContextManager[None]:
        """The network's trained weights are in the compute precision."""
        return self.weights.computing()

    def exact(self, write: bool = False) -> AbstractContextManager[None]:
        """The network's trained weights are the exact ones, to read or to write, outside of `computing`."""
        return nullcontext()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network's trained weights are their moving averages."""
        assert self.ema is not None
        with holding(self.weights.parameters, self.ema.averages):
            yield

    @property
    def can_begin_again(self) -> bool:
        """Whether an update that was broken off in a backward pass has changed nothing but the gradients."""
        return not self.config.optimizer_in_backward

    # gradients

    def loss_scale(self) -> Tensor:
        """What losses are multiplied by before a backward pass, [] on the device: 1 except for fp16."""
        return self._scale.value

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, which carries its share of the update's pairs already."""
        (loss * self.loss_scale().to(loss.dtype)).backward()

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        """Adds the gradient of a loss with this gradient for `output`, times `loss_scale`."""
        output.backward(gradient)

    def zero_gradients(self) -> None:
        """Forgets the gradients since the last update, or sets them to zero where they must stay in place."""
        self.weights.clear_gradients(keep=self.keeps_gradients)

    def forward_passes(self, mine: int) -> int:
        """Forward passes that this process must make where it needs `mine`: no more."""
        return mine

    # one update

    def step(self) -> dict[str, Tensor]:
        """One update from the gradients since the last one: `grad_norm` before clipping, and for fp16 the loss scale
        and whether the update was left out because a gradient overflowed."""
        self.updates += 1
        if self.config.optimizer_in_backward:
            return self._finish_in_backward()
        self._average_over_processes()
        found = [gradient for gradient in self.weights.gradients if gradient is not None]
        norm = _norm(found) / self._scale.value
        multiplier = (self.config.train_max_grad_norm / (norm + 1e-6)).clamp(max=1.0) / self._scale.value
        overflowed = ~norm.isfinite() & self._scale.enabled
        self._apply(multiplier, overflowed)
        logged = {"grad_norm": norm}
        if self._scale.enabled:
            logged |= {"skipped_step": overflowed.float(), "loss_scale": self._scale.value.clone()}
        self._scale.update(overflowed)
        self._warmup.set_rate(self.updates)
        return logged

    def _apply(self, multiplier: Tensor, overflowed: Tensor) -> None:
        """The optimizer's step, where its weights are; none if a gradient overflowed."""
        if self._is_plain and self._scale.enabled:
            # a fused step reads this on the device
            self.optimizer.found_inf = overflowed.float()  # type: ignore[attr-defined]
        elif self._scale.enabled and overflowed.item():
            self.zero_gradients()
            return
        if self._is_plain:
            step_in_place(self.optimizer, self.weights, multiplier)
            self.zero_gradients()
            self.weights.refresh()
        elif self._offload is not None:
            self._offload.step(multiplier.item())
            self.zero_gradients()
        else:
            step_in_buckets(self.optimizer, self.weights, multiplier, self._dice())
            self.zero_gradients()
            self.weights.refresh()
        if self.ema is not None:
            self.ema.update(self.weights.masters, overflowed if self._scale.enabled else None)

    @property
    def _is_plain(self) -> bool:
        """Whether one call of the optimizer updates everything where it is."""
        amp = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        exact = self.weights.truth == "device" and self._gradient_dtype == torch.float32
        return exact and not hasattr(self.optimizer, "init_state") and (amp or not self._scale.enabled)

    @property
    def _gradient_dtype(self) -> torch.dtype:
        return self.weights.dtype if self.config.train_gradient_dtype == "half" else torch.float32

    def _dice(self, i: int = 0) -> torch.Generator:
        # the same in every process, and in a run that was resumed
        return self._random.manual_seed(((self.config.seed * 1_000_003 + self.updates) * 10_007 + i) % 2**63)

    def _update_in_backward(self) -> None:
        for i, parameter in enumerate(self.weights.parameters):
            parameter.register_post_accumulate_grad_hook(lambda _, i=i: self._update_one(i))

    @torch.no_grad()
    def _update_one(self, i: int) -> None:
        step_in_buckets(self.optimizer, self.weights, 1 / self._scale.value, self._dice(i), [i])
        self.weights.set_gradient(i, None)

    def _finish_in_backward(self) -> dict[str, Tensor]:
        self.weights.refresh()
        if self.ema is not None:
            self.ema.update(self.weights.masters)
        self._warmup.set_rate(self.updates)
        return {}

    # processes

    def _broadcast(self) -> None:
        for master in self.weights.masters:
            here = master.data.to(self.accelerator.device)
            dist.broadcast(here, src=0)
            master.data.copy_(here)
        self.weights.refresh()

    def _average_over_processes(self) -> None:
        many = self.accelerator.num_processes > 1
        # with several processes all must have something to add; no gradient at all means a step on zero
        if many or all(gradient is None for gradient in self.weights.gradients):
            self.weights.fill_gradients(self._gradient_dtype)
        if not many:
            return
        gradients = [gradient for gradient in self.weights.gradients if gradient is not None]
        for bucket in buckets(gradient.numel() for gradient in gradients):
            mine = [gradients[i] for i in bucket]
            message = torch.cat([gradient.flatten() for gradient in mine])
            # first: a sum of half-precision gradients may overflow
            message /= self.accelerator.num_processes
            dist.all_reduce(message)
            parts = message.split([gradient.numel() for gradient in mine])
            torch._foreach_copy_(mine, [part.view(g.shape) for part, g in zip(parts, mine, strict=True)])

    # what a checkpoint keeps

    def bytes_before_first_step(self) -> int:
        """What the first update will allocate on the device: gradients and Adam's moments, unless they are there."""
        weights = sum(parameter.numel() for parameter in self.weights.parameters)
        gradients = 0 if self.keeps_gradients or self.config.optimizer_in_backward else self._gradient_dtype.itemsize
        states = 2 if self.config.train_use_8bit_adam else 8
        if self.optimizer.state or (self._offload is not None and self.accelerator.device.type == "cuda"):
            states = 0
        return weights * (gradients + states)

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the weights, for this engine or another one; every process calls it."""
        if not self.accelerator.is_main_process:
            # it would copy everything for nobody
            return {}
        kept: dict[str, Any] = {"loss_scale": self._scale.state_dict(), "updates": self.updates}
        if moments.are_adams(self.optimizer):
            kept["step"] = moments.step_of(self.optimizer)
            for moment in moments.MOMENTS:
                kept[moment] = [moments.keep(self.optimizer, master, moment) for master in self.weights.masters]
        else:
            kept["optimizer"] = self.optimizer.state_dict()
        if self.ema is not None:
            kept["ema"] = [average.cpu() for average in self.ema.averages]
        return kept

    def process_state(self) -> dict[str, Any]:
        """What is this process's alone: nothing."""
        return {}

    def load_process_state(self, saved: dict[str, Any]) -> None:
        """Takes what an engine's `process_state` gave."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what any engine's `state_dict` gave; the network has the weights already."""
        self.updates = state["updates"]
        self._scale.load_state_dict(state["loss_scale"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        elif state["step"]:
            for i, master in enumerate(self.weights.masters):
                values = {moment: state[moment][i] for moment in moments.MOMENTS}
                seen = master.data if self._is_plain else flat(master)
                moments.put(self.optimizer, master, values, state["step"], seen)
        if self.ema is not None:
            self.ema.set(state.get("ema", self.weights.masters))
        self._warmup.set_rate(self.updates)


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """The length of all gradients together, summed in fp32, or in fp64 if they are."""
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    norms = torch._foreach_norm(list(gradients), 2, dtype=wide)
    return torch.linalg.vector_norm(torch.stack(list(norms)))
