"""The exact weights that an optimizer trains, and the half-precision copies of them that a network computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Truth = Literal["device", "host", "copies"]


class MasterWeights:
    """The trained parameters of a network in two precisions.

    Outside of `computing` the network's parameters are the exact weights, so whatever saves or reads them sees all
    their bits; inside, they are copies in `dtype` on the device. Gradients are added up in `gradient_dtype` as each
    becomes ready in a backward pass, and freed. For fp32 on one device there is one set of weights, and autograd adds
    up its gradients.

    Args:
        parameters: fp32.
        dtype: what the network computes in.
        device: where it computes.
        truth: where the exact weights are: fp32 beside the network, fp32 in host memory, or nowhere but in the copies,
            which must then be updated with stochastic rounding.
        gradient_dtype: what gradients are added up in; None means `dtype`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        truth: Truth = "device",
        gradient_dtype: torch.dtype | None = torch.float32,
    ) -> None:
        self.parameters = list(parameters)
        self.dtype = dtype
        self.truth = truth
        self.masters = self.parameters
        self.copies: list[Tensor] = []
        self._sums: list[Tensor | None] = []
        self._is_computing = False
        self._seen: list[int] = []
        if dtype == torch.float32 and truth == "device":
            return
        self.copies = [p.detach().to(device, dtype, copy=True) for p in self.parameters]
        exact = self.copies if truth == "copies" else [_at(p.detach(), truth, device) for p in self.parameters]
        self.masters = [nn.Parameter(values) for values in exact]
        self._sums = [None] * len(self.parameters)
        self._give([master.data for master in self.masters])
        for i, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(sums_to(self._sums, i, gradient_dtype or dtype))

    @property
    def is_one_set(self) -> bool:
        """Whether the network computes with what the optimizer trains."""
        return not self.copies

    @property
    def weights(self) -> list[Tensor]:
        """What the network computes with."""
        return self.copies or [p.detach() for p in self.parameters]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The network has its copies, made of the exact weights as they are now; may be nested."""
        if self._is_computing or self.is_one_set:
            yield
            return
        # host memory is far: it is read again only if somebody has written to it
        if self.truth != "host" or [p._version for p in self.parameters] != self._seen:
            self.refresh()
        self._give(self.copies)
        self._is_computing = True
        try:
            yield
        finally:
            self._is_computing = False
            self._give([master.data for master in self.masters])

    def refresh(self) -> None:
        """Brings the copies up to date."""
        if not self.is_one_set and self.truth != "copies":
            torch._foreach_copy_(self.copies, [master.detach() for master in self.masters])

    # gradients

    @property
    def gradients(self) -> list[Tensor | None]:
        """The sum for each parameter since the last `clear_gradients`, on the device; None where there was nothing."""
        return [p.grad for p in self.parameters] if self.is_one_set else list(self._sums)

    def set_gradient(self, i: int, gradient: Tensor | None) -> None:
        if self.is_one_set:
            self.parameters[i].grad = gradient
        else:
            self._sums[i] = gradient

    def clear_gradients(self, keep: bool = False) -> None:
        """Forgets the gradients, or sets them to zero where they are if they must stay there."""
        if not self.is_one_set:
            # of a backward pass that was broken off
            for parameter in self.parameters:
                parameter.grad = None
        gradients = self.gradients
        if keep:
            # one launch for many
            if found := [gradient for gradient in gradients if gradient is not None]:
                torch._foreach_zero_(found)
            return
        for i in range(len(gradients)):
            self.set_gradient(i, None)

    def fill_gradients(self, gradient_dtype: torch.dtype) -> None:
        """Zeros where there is no gradient yet."""
        for i, (gradient, weight) in enumerate(zip(self.gradients, self.weights, strict=True)):
            if gradient is None:
                self.set_gradient(i, torch.zeros_like(weight, dtype=gradient_dtype))

    def _give(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value
        self._seen = [p._version for p in self.parameters]


def sums_to(sums: list[Tensor | None], i: int, dtype: torch.dtype) -> Callable[[Tensor], None]:
    """A hook for when a parameter's gradient is ready: adds it to `sums[i]`, in `dtype`, and frees it."""

    def add(parameter: Tensor) -> None:
        gradient, total = parameter.grad, sums[i]
        assert gradient is not None
        # first: memory may run out below, and what is begun again must not find this
        parameter.grad = None
        if total is None:
            sums[i] = gradient.to(dtype)
        else:
            # one kernel, which widens as it reads
            total.add_(gradient)

    return add


def _at(weights: Tensor, truth: Truth, device: torch.device | str) -> Tensor:
    # not page-locked: that is given out in powers of two, and what goes to and fro is copied a bucket at a time anyway
    return weights.to(device if truth == "device" else "cpu")
