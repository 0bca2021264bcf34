"""The interface between the trainer and an engine, which turns gradients into new weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ddpo_fast.engine.ema import EMA
from ddpo_fast.engine.optimizers import LearningRate


class Engine(Protocol):
    """Owns the trained weights from the backward pass to the optimizer's step.

    An update consists of `backward` or `backward_from` for each micro-batch, and then one `step`. Gradients are summed
    over the micro-batches on each process, and combined across processes once, in `step`; ZeRO's stages 2 and 3 combine
    them in each backward pass. The network is called directly: there is no wrapper such as DistributedDataParallel,
    which a call of the bare network would bypass.
    """

    optimizer: torch.optim.Optimizer
    rate: LearningRate
    # updates so far
    updates: int
    # the moving average of the trained weights, if the settings ask for one
    ema: EMA | None

    def computing(self) -> AbstractContextManager[None]:
        """A context in which the network's trained weights are in the compute precision; may be nested."""

    def exact(self, write: bool = False) -> AbstractContextManager[None]:
        """A context in which the main process can read the network's trained weights, whole and in fp32.

        With stochastic rounding there are no fp32 weights, and the half-precision ones are read. Every process must
        enter the context, outside of `computing`, because entering may gather weights from all processes.

        Args:
            write: allows changing the weights, in the same way on every process.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """Like `exact`, to read only, with the weights' moving averages in their place. Needs `ema`."""

    def computing_averages(self) -> AbstractContextManager[None]:
        """Like `computing`, with the weights' moving averages, rounded, in their place. Needs `ema`."""

    @property
    def can_begin_again(self) -> bool:
        """Whether an update can be repeated after a failed backward pass, as only gradients have changed by then."""

    def loss_scale(self) -> Tensor:
        """What the loss is multiplied by before a backward pass, [] on the device: 1 except for fp16.

        Must be called before each `backward_from`.
        """

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a scalar loss, which is already weighted by its micro-batch's share of the update."""

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        """Backpropagates from the network's `output` and adds the weights' gradients.

        Args:
            gradient: the loss's gradient with respect to `output`, times `loss_scale`.
        """

    def keep_gradients(self) -> None:
        """Keeps gradients at their addresses between updates from now on.

        A CUDA graph writes to the addresses that they had while it was recorded.
        """

    def zero_gradients(self) -> None:
        """Discards the gradients since the last update, if the engine `can_begin_again`."""

    def forward_passes(self, mine: int) -> int:
        """The number of forward and backward passes that this process must run, given that its own pairs need `mine`.

        The number is larger than `mine` if weights or gradients are split over processes and another process needs more
        passes: each has to contribute its part of the weights, or its gradients, to every pass of the others.
        """

    def step(self, settle: Callable[[], float] | None = None) -> dict[str, Tensor]:
        """Updates the weights from the gradients since the last update, and sets the next update's learning rate.

        Args:
            settle: called after the update, when the network computes with the new weights. It returns what to
                multiply the update by. Unless that is 1, the weights are moved along the line from those before the
                update, of which a copy is kept for it, and `settle` is called again. With `optimizer_in_backward` there
                is no such copy, and `settle` must return 1.

        Returns scalars on the device: `grad_norm` before clipping and, for fp16, `loss_scale` and `skipped_step` (1 if
        a gradient overflowed and the weights stayed as they were).
        """

    def forget_direction(self) -> None:
        """Forgets the mean of earlier gradients, if the optimizer is Adam: to be called when weights are replaced."""

    def bytes_before_first_step(self) -> int:
        """Bytes that the first update will allocate on the device: gradients, and the optimizer's states."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the weights, in a form that any kind of engine can load.

        Every process must call it. Only the main process's result is complete.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the `state_dict` of any kind of engine; the network must have its weights already."""

    def process_state(self) -> dict[str, Any]:
        """What a checkpoint keeps for this process only, to resume with the same number of processes and settings."""

    def load_process_state(self, saved: dict[str, Any]) -> None:
        """Continues from the `process_state` of any engine; ignores one that does not fit this engine."""
