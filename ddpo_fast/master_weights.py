"""fp32 weights that an optimizer trains, and the half-precision copies of them that a network computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MasterWeights:
    """The trained parameters of a network in two precisions.

    Outside of `computing` the network's parameters are the fp32 weights, so whatever saves or reads them sees all
    their bits; inside, they are copies in `dtype`. Their gradients are added up in fp32, in `masters[i].grad`, as each
    becomes ready in a backward pass, and freed. For fp32 there is one set of weights, and this does nothing.

    Args:
        parameters: fp32, on the device that they will be trained on.
        dtype: what the network computes in.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self.parameters = list(parameters)
        self.dtype = dtype
        self.masters = self.parameters
        self._copies: list[Tensor] = []
        self._is_computing = False
        if dtype == torch.float32:
            return
        self.masters = [nn.Parameter(p.detach()) for p in self.parameters]
        self._copies = [p.detach().to(dtype) for p in self.parameters]
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.register_post_accumulate_grad_hook(_adds_to(master))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The network has its copies, made of the fp32 weights as they are now; may be nested."""
        if self._is_computing or not self._copies:
            yield
            return
        self.refresh()
        self._give(self._copies)
        self._is_computing = True
        try:
            yield
        finally:
            self._is_computing = False
            self._give([master.data for master in self.masters])

    def refresh(self) -> None:
        """Brings the copies up to date: after every update."""
        if self._copies:
            torch._foreach_copy_(self._copies, [master.detach() for master in self.masters])

    def _give(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value


def _adds_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        grad = parameter.grad
        assert grad is not None
        if master.grad is None:
            master.grad = grad.float()
        else:
            # one kernel, which widens as it reads
            master.grad.add_(grad)
        parameter.grad = None

    return add
