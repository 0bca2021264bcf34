"""What the trainer asks of an engine, which turns gradients into new weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ddpo_fast.engine.ema import EMA


class Engine(Protocol):
    """Owns the trained weights from the backward pass to the optimizer's step.

    An update goes: `backward` or `backward_from` for each micro-batch, and one `step`. Gradients are summed over the
    micro-batches on each process, and combined across processes once, in `step`. The network is called directly: there
    is no wrapper such as DistributedDataParallel, which a call of the bare network would bypass.
    """

    optimizer: torch.optim.Optimizer
    # the moving average of the trained weights, if the settings ask for one
    ema: EMA | None

    def computing(self) -> AbstractContextManager[None]:
        """Inside, the network's trained weights are in the compute precision; may be nested."""

    def exact(self, write: bool = False) -> AbstractContextManager[None]:
        """Inside, the network's trained weights are whole and in fp32 (or all that there is of them with stochastic
        rounding), to be read on the main process.

        Every process must enter it, outside of `computing`, as it may gather weights from all of them.

        Args:
            write: the weights may be changed too, in the same way on every process.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """Like `exact`, to read only, with the weights' moving averages in their place. Needs `ema`."""

    @property
    def can_begin_again(self) -> bool:
        """Whether an update can be repeated after its backward pass failed: that has changed only gradients."""

    def loss_scale(self) -> Tensor:
        """What the loss is multiplied by before a backward pass, [] on the device: 1 except for fp16.

        Must be called before each `backward_from`.
        """

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a scalar loss, which is weighted already by its micro-batch's share of the update."""

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        """Adds the gradient of a loss whose gradient with respect to `output`, times `loss_scale`, is `gradient`."""

    def zero_gradients(self) -> None:
        """Discards the gradients since the last update."""

    def forward_passes(self, mine: int) -> int:
        """The forward passes that this process must run if its own pairs need `mine`.

        More than `mine` where weights are split over processes: each process must then take part in the forward passes
        of all others, by contributing its part of the weights.
        """

    def step(self) -> dict[str, Tensor]:
        """Updates the weights from the gradients since the last update, and sets the next update's learning rate.

        Returns scalars on the device: `grad_norm` before clipping and, for fp16, `loss_scale` and `skipped_step` (1 if
        a gradient overflowed and the weights stayed as they were).
        """

    def bytes_before_first_step(self) -> int:
        """Bytes that the first update will allocate on the device: gradients, and the optimizer's states."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights, in a form that any kind of engine can load.

        Every process must call it; what the main process gets is complete.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the `state_dict` of any kind of engine; the network must have its weights already."""

    def process_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this process alone, for a run with as many processes and the same settings."""

    def load_process_state(self, saved: dict[str, Any]) -> None:
        """Continues from the `process_state` of any engine; ignores one that does not fit this engine."""
