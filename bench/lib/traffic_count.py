"""Counts launches, bytes and FLOPs of a call on the device `meta`, which has shapes and no values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddpo_fast.ops.backend import OPS
from lib.traffic_rules import OWN_RULES, RULES, Launch, launches_of


class Traffic(NamedTuple):
    """What a forward pass launches, what the backward pass then launches, and bytes that are saved for it.

    Saved bytes are of activations: parameters are not counted.
    """

    forward: list[Launch]
    backward: list[Launch]
    saved: int


class Counter(TorchDispatchMode):
    """Collects the launches of all ops that are called within."""

    # the one that compiled blocks add their launches to (`traffic_compiled.py`), as it cannot see what runs in them
    current: Counter | None = None

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "ddpo_fast":
            return self.own_op(func, args)
        if func.overloadpacket not in RULES and is_composite(func):
            # such an op reaches a mode as a whole only if it is called inside of a custom op
            with self:
                return func.decompose(*args, **kwargs)
        out = as_cudnn_lays_out(func, args, func(*args, **kwargs))
        self.launches += launches_of(func, args, kwargs, out)
        return out

    def own_op(self, func: Any, args: Any) -> Any:
        """An op of this project, as the GPU runs it: its Triton kernel, else its definition by PyTorch's ops."""
        name = func._schema.name.removeprefix("ddpo_fast::")
        if (rule := OWN_RULES.get(name)) is not None:
            out = func(*args)
            self.launches += rule(out, *args)
            return out
        assert OPS[name].implementations["triton"] is None, f"{name} has a kernel: it needs a rule in OWN_RULES"
        definition: Any = OPS[name].implementations["reference"]
        # PyTorch switches a dispatch mode off while the mode handles an op
        with self:
            return definition(*args)


@contextmanager
def current(counter: Counter) -> Iterator[Counter]:
    Counter.current = counter
    try:
        with counter:
            yield counter
    finally:
        Counter.current = None


def is_composite(func: Any) -> bool:
    """Whether PyTorch composes the op of others on every device."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(func.name(), "CompositeImplicitAutograd") and not has_kernel(func.name(), "CPU")


def as_cudnn_lays_out(func: Any, args: Any, out: Any) -> Any:
    """The results of convolutions in channels_last where an operand is, as on a GPU; on `meta` they are contiguous."""
    if func.overloadpacket is torch.ops.aten.convolution:
        return out.to(memory_format=memory_format(*args[:2]))
    if func.overloadpacket is torch.ops.aten.convolution_backward:
        layout, (dx, dweight, dbias) = memory_format(*args[1:3]), out
        return (*(grad if grad is None else grad.to(memory_format=layout) for grad in (dx, dweight)), dbias)
    return out


def memory_format(*operands: Tensor) -> torch.memory_format:
    last = any(suggest_memory_format(operand) == torch.channels_last for operand in operands)
    return torch.channels_last if last else torch.contiguous_format


class OpsOfGPU(TorchFunctionMode):
    """SDPA and RMS norm by the kernels that a GPU has for them; on the device `meta`, PyTorch would compose them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return OPS_OF_GPU.get(func, func)(*args, **(kwargs or {}))


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    assert attn_mask is None, "FlashAttention takes no mask"
    assert not dropout_p, "counted without dropout"
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
    return attended


def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    normed: Tensor = torch.ops.traffic.rms_norm(x, weight)[0]
    return normed


OPS_OF_GPU: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: flash_attention,
    F.rms_norm: rms_norm,
}


def count(network: nn.Module, call: Callable[[], Tensor], trained: bool = True) -> Traffic:
    """Counts a call of a network on the device `meta`, and the backward pass if its weights are `trained`.

    The gradient of the result is given, so that no loss is counted.
    """
    weights = [weight.untyped_storage() for weight in network.parameters()]
    own = {storage._cdata for storage in weights}
    saved: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with OpsOfGPU(), torch.set_grad_enabled(trained), saved_tensors_hooks(keep, lambda tensor: tensor):
        with current(Counter()) as forward:
            out = call()
        if not trained:
            return Traffic(forward.launches, [], 0)
        kept = sum(storage.nbytes() for storage in saved.values())
        gradient = torch.empty_like(out)
        with current(Counter()) as backward:
            out.backward(gradient)
    return Traffic(forward.launches, backward.launches, kept)
