"""The weights of mixed-precision training: fp32 for the optimizer, half precision for the network.

Micikevicius et al., Mixed Precision Training (arXiv 1710.03740), call the former master weights. Without them most
updates would be lost: bf16 has 8 significant bits, so that a weight of 1 stays 1 when 1e-4 is added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from ddpo_fast.temporary_values import temporary_values

# Where the fp32 weights that the optimizer trains are kept. "none": there are none, and the optimizer's updates are
# rounded stochastically into the half-precision weights that the network computes with.
ExactWeights = Literal["device", "host", "none"]


class MasterWeights:
    """The trained parameters of a network, as the optimizer sees them and as the network computes with them.

    `masters` are what the optimizer trains, `copies` are what the network computes with. Outside of `computing` the
    network's parameters are the masters, so that code that saves or loads the network sees the fp32 values. Inside, the
    network's parameters are the copies. If the network computes in fp32 and the masters are on its device, the masters
    are the parameters themselves, and there are no copies.

    As soon as a backward pass has computed the gradient of a copy, the gradient is added to a total in `gradient_dtype`
    and freed, so that only a few half-precision gradients exist at a time. Without copies autograd adds up gradients by
    itself.

    Args:
        parameters: fp32.
        dtype: what the network computes in.
        device: where the network computes.
        exact_weights: "device" or "host": where the fp32 masters are. "none": there are no fp32 weights, and the
            masters are the copies.
        gradient_dtype: what gradients are added up in; None means `dtype`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        exact_weights: ExactWeights = "device",
        gradient_dtype: torch.dtype | None = torch.float32,
    ) -> None:
        self.parameters = list(parameters)
        self.dtype = dtype
        self.exact_weights = exact_weights
        self.masters = self.parameters
        self.copies: list[Tensor] = []
        # gradients with respect to the copies, added up since the last update
        self._gradients: list[Tensor | None] = []
        self._is_computing = False
        # what `computing_with` computes with where it can overwrite nothing
        self._stand_ins: list[Tensor] = []
        # PyTorch's version counters of the parameters, which every write in place increases
        self._versions: list[int] = []
        if dtype == torch.float32 and exact_weights == "device":
            return
        self.copies = [p.detach().to(device, dtype, copy=True) for p in self.parameters]
        if exact_weights == "none":
            masters = self.copies
        else:
            # On the host the masters are not pinned: PyTorch's allocator of pinned memory rounds sizes up to powers of
            # two, and an offloaded step copies a bucket at a time through small pinned buffers anyway (offload.py).
            masters = [p.detach().to(device if exact_weights == "device" else "cpu") for p in self.parameters]
        self.masters = [nn.Parameter(values) for values in masters]
        self._gradients = [None] * len(self.parameters)
        self._point_parameters_at([master.data for master in self.masters])
        for i, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(accumulate_into(self._gradients, i, gradient_dtype or dtype))

    @property
    def has_copies(self) -> bool:
        """Whether the network computes with copies, and not with the masters themselves."""
        return bool(self.copies)

    @property
    def weights(self) -> list[Tensor]:
        """What the network computes with."""
        return self.copies or [p.detach() for p in self.parameters]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, the network's parameters are the copies, brought up to date with the masters; may be nested."""
        if self._is_computing or not self.has_copies:
            yield
            return
        # Weights may have been loaded into the network since the last update. Masters on the device are copied again
        # each time, which is cheap. Copying from host memory is slow, so it is done only if a version counter shows a
        # write.
        if self.exact_weights != "host" or [p._version for p in self.parameters] != self._versions:
            self.refresh()
        self._point_parameters_at(self.copies)
        self._is_computing = True
        try:
            yield
        finally:
            self._is_computing = False
            self._point_parameters_at([master.data for master in self.masters])

    @contextmanager
    def computing_with(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Like `computing`, with `values` in the place of the weights, rounded to the dtype and on the device of these.

        Neither the masters nor the values may change inside. From call to call the network's parameters are at the same
        addresses, as a recorded CUDA graph reads them there.
        """
        with self.computing():
            if self.has_copies and self.exact_weights != "none":
                # the copies can be made again, so this takes no memory
                torch._foreach_copy_(self.copies, [value.detach() for value in values])
                try:
                    yield
                finally:
                    self.refresh()
                return
            weights = self.weights
            if any(
                (value.dtype, value.device) != (w.dtype, w.device) for value, w in zip(values, weights, strict=True)
            ):
                self._stand_ins = self._stand_ins or [torch.empty_like(weight) for weight in weights]
                torch._foreach_copy_(self._stand_ins, [value.detach() for value in values])
                values = self._stand_ins
            with temporary_values(self.parameters, values):
                yield

    def refresh(self) -> None:
        """Rounds the masters into the copies."""
        if self.has_copies and self.exact_weights != "none":
            torch._foreach_copy_(self.copies, [master.detach() for master in self.masters])

    # gradients

    @property
    def gradients(self) -> list[Tensor | None]:
        """The gradient of each parameter since the last `clear_gradients`, on the device; None where there is none."""
        return list(self._gradients) if self.has_copies else [p.grad for p in self.parameters]

    def set_gradient(self, i: int, gradient: Tensor | None) -> None:
        """Replaces the gradient of the parameter with index `i`."""
        if self.has_copies:
            self._gradients[i] = gradient
        else:
            self.parameters[i].grad = gradient

    def clear_gradients(self, keep: bool = False) -> None:
        """Discards the gradients, or with `keep` sets them to zero in place."""
        if self.has_copies:
            # The hook moves gradients away from here, so only a backward pass that failed half-way leaves any.
            for parameter in self.parameters:
                parameter.grad = None
        gradients = self.gradients
        if keep:
            # one kernel launch for many tensors
            if found := [gradient for gradient in gradients if gradient is not None]:
                torch._foreach_zero_(found)
            return
        for i in range(len(gradients)):
            self.set_gradient(i, None)

    def fill_gradients(self, gradient_dtype: torch.dtype) -> None:
        """Gives every parameter without a gradient a gradient of zeros."""
        for i, (gradient, weight) in enumerate(zip(self.gradients, self.weights, strict=True)):
            if gradient is None:
                self.set_gradient(i, torch.zeros_like(weight, dtype=gradient_dtype))

    def _point_parameters_at(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value
        self._versions = [p._version for p in self.parameters]


def accumulate_into(totals: list[Tensor | None], i: int, dtype: torch.dtype) -> Callable[[Tensor], None]:
    """A hook for `register_post_accumulate_grad_hook`: adds the parameter's gradient to `totals[i]` and frees it.

    Args:
        dtype: of the total. fp32 matters for long sums: in bf16 a term of less than 1/512 of the total is lost.
    """

    def add(parameter: Tensor) -> None:
        gradient, total = parameter.grad, totals[i]
        assert gradient is not None
        # Cleared first, because the addition below may run out of memory. The micro-batch is then repeated in smaller
        # parts, and autograd would add their gradients to a gradient that is still here.
        parameter.grad = None
        if total is None:
            totals[i] = gradient.to(dtype)
        else:
            # the kernel converts the half-precision gradient as it reads it: no fp32 copy is made
            total.add_(gradient)

    return add
