"""What the trainer asks of an engine, which turns gradients into weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ddpo_fast.engine.ema import EMA


class Engine(Protocol):
    """Owns the trained weights from the backward pass to the optimizer's step.

    Gradients are summed over the micro-batches of an update, whose losses carry their share of it, and meet those of
    other processes once, in `step`. So the network is called bare, and no wrapper can be bypassed.
    """

    optimizer: torch.optim.Optimizer
    # the moving average of the trained weights, if the settings ask for one
    ema: EMA | None

    def computing(self) -> AbstractContextManager[None]:
        """Inside, the network's trained weights are in the compute precision; may be nested."""

    def exact(self, write: bool = False) -> AbstractContextManager[None]:
        """Inside, the network's trained weights are whole and in fp32, to read on the main process.

        With `write` they may be written, alike on every process. Every process enters it, outside of `computing`.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the network's trained weights are their moving averages; as `exact`, to read. Needs `ema`."""

    @property
    def can_begin_again(self) -> bool:
        """Whether an update that was broken off in a backward pass has changed nothing but the gradients."""

    def loss_scale(self) -> Tensor:
        """What losses are multiplied by before a backward pass, [] on the device: 1 except for fp16.

        To be asked before each `backward_from`.
        """

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, a scalar that carries its share of the update's pairs already."""

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        """Adds the gradient of a loss whose gradient with respect to `output` is `gradient`, times `loss_scale`."""

    def zero_gradients(self) -> None:
        """Forgets the gradients since the last update."""

    def forward_passes(self, mine: int) -> int:
        """Forward passes that this process must make where it needs `mine` for its own pairs.

        More than that where weights are split: every process has a part that the others' passes need.
        """

    def step(self) -> dict[str, Tensor]:
        """One update from the gradients since the last one; the learning rate follows the warm-up.

        Returns `grad_norm` before clipping and, for fp16, `loss_scale` and `skipped_step` (1 if a gradient overflowed
        and the update was left out), scalars on the device.
        """

    def bytes_before_first_step(self) -> int:
        """Bytes that the first update will allocate on the device: gradients, and the optimizer's states."""

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the weights, for this kind of engine or another one; every process calls it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what any engine's `state_dict` gave; the network has its weights already."""

    def process_state(self) -> dict[str, Any]:
        """What this process alone keeps, for the same number of processes and the same settings."""

    def load_process_state(self, saved: dict[str, Any]) -> None:
        """Takes what any engine's `process_state` gave; uses it if it is of this kind."""
