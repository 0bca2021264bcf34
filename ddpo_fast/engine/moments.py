"""Adam's two moments in checkpoints, in a form from which PyTorch's, bitsandbytes' and our AdamW can all continue.

PyTorch calls a parameter's moments `exp_avg` and `exp_avg_sq` and keeps them in fp32. bitsandbytes (and HostAdamW8bit)
calls them `state1` and `state2`: fp32 for small parameters, and for large ones 8-bit codes, with the scales `absmax1`
and `absmax2` of each 256 of them (see ops/adamw8bit.py).

A checkpoint has each moment in one of two forms:
    a tensor in fp32 and in the parameter's shape, or
    `{"codes": uint8 [N], "absmax": fp32 [ceil(N / 256)], "order": [dimensions]}`: the optimizer's 8-bit codes.
Blocks of 256 are counted in the order in which the parameter lies in memory. `order` is its dimensions from the
outermost in memory to the innermost, e.g. [0, 2, 3, 1] for a channels_last convolution. The functions here pass moments
to each other as fp32 tensors [N] in the order of the parameter's memory.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddpo_fast.engine.optimizers import flat
from ddpo_fast.ops.adamw8bit import dequantise, quantise
from ddpo_fast.temporary_values import temporary_values

# PyTorch's names, which are also the keys in checkpoints
MOMENTS = ("exp_avg", "exp_avg_sq")
# bitsandbytes' names for values (or codes) and scales
BITSANDBYTES_NAMES = {"exp_avg": ("state1", "absmax1"), "exp_avg_sq": ("state2", "absmax2")}
SavedMoment: TypeAlias = Tensor | dict[str, Any]


def is_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's states are, or will be, a count of steps and these two moments and nothing else."""
    group = optimizer.param_groups[0]
    # AMSGrad has a third state, the largest mean of squares so far
    return "betas" in group and not group.get("amsgrad", False)


def step_of(optimizer: torch.optim.Optimizer) -> int:
    """The number of steps that the optimizer has taken."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def forget_direction(optimizer: torch.optim.Optimizer) -> None:
    """Sets the mean of earlier gradients to zero, so that the next step goes where the next gradient points."""
    values, scales = BITSANDBYTES_NAMES["exp_avg"]
    for state in optimizer.state.values():
        # 8-bit codes are multiplied by their scales, so zero scales are enough
        for name in ("exp_avg", scales) if scales in state else ("exp_avg", values):
            if name in state:
                state[name].zero_()


def read(optimizer: torch.optim.Optimizer, parameter: Tensor, moment: str) -> Tensor:
    """A parameter's moment in fp32, [N], in the order of the parameter's memory; zeros before the first step."""
    state = optimizer.state.get(parameter, {})
    values, scales = BITSANDBYTES_NAMES[moment]
    if _is_quantised(state, moment):
        return dequantise(state[values], state[scales], signed=moment == "exp_avg")
    value = state.get(moment, state.get(values))
    if value is None:
        return torch.zeros(parameter.numel(), device=parameter.device)
    return flat(value, like=parameter).float() if value.shape == parameter.shape else value.float().view(-1)


def write(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    saved: dict[str, SavedMoment],
    step: int,
    data_in_step: Tensor | None = None,
) -> None:
    """Sets a parameter's moments to those of a checkpoint, and its count of steps.

    8-bit codes are copied unchanged if the optimizer keeps 8-bit codes in the same order of elements. Dequantising and
    quantising them again could give other codes, and a resumed run would then not have the same bits.

    Args:
        data_in_step: the tensor that the parameter's `data` is replaced by during the optimizer's steps (see
            `step_in_buckets`), or None if it is not replaced. New states get the shape of this tensor.
    """
    with temporary_values([parameter], [parameter.data if data_in_step is None else data_in_step]):
        state = _state_at(optimizer, parameter, step)
    for moment, value in saved.items():
        values, scales = BITSANDBYTES_NAMES[moment]
        if not _is_quantised(state, moment):
            flat(state[moment] if moment in state else state[values]).copy_(from_checkpoint(value, parameter, moment))
            continue
        if isinstance(value, dict) and value["order"] == _memory_order(parameter):
            codes, absmax = value["codes"], value["absmax"]
        else:
            exact = from_checkpoint(value, parameter, moment).to(state[values].device)
            codes, absmax = quantise(exact, signed=moment == "exp_avg")
        flat(state[values]).copy_(codes)
        state[scales].copy_(absmax)


def to_checkpoint(optimizer: torch.optim.Optimizer, parameter: Tensor, moment: str) -> SavedMoment:
    """A parameter's moment as a checkpoint keeps it, in host memory."""
    state = optimizer.state.get(parameter, {})
    if not _is_quantised(state, moment):
        # `read` gives the values in the order of the parameter's memory, so the parameter's strides restore its shape
        return read(optimizer, parameter, moment).cpu().as_strided(parameter.shape, parameter.stride())
    codes, absmax = (flat(state[name]).cpu() for name in BITSANDBYTES_NAMES[moment])
    return {"codes": codes, "absmax": absmax, "order": _memory_order(parameter)}


def from_checkpoint(saved: SavedMoment, parameter: Tensor, moment: str) -> Tensor:
    """A checkpoint's moment in fp32, [N], in the order of the parameter's memory, which may be on `meta`."""
    if isinstance(saved, Tensor):
        return flat(saved.float(), like=parameter)
    values = dequantise(saved["codes"], saved["absmax"], signed=moment == "exp_avg")
    # View the values with the dimensions in the codes' order, permute these into the parameter's order of dimensions,
    # and let `flat` bring the elements into the order of the parameter's memory.
    outer_to_inner = values.view([parameter.shape[d] for d in saved["order"]])
    return flat(outer_to_inner.permute([saved["order"].index(d) for d in range(parameter.ndim)]), like=parameter)


def _memory_order(parameter: Tensor) -> list[int]:
    """The parameter's dimensions, the outermost in memory first."""
    return sorted(range(parameter.ndim), key=lambda d: -parameter.stride()[d])


def _is_quantised(state: dict[str, Any], moment: str) -> bool:
    # bitsandbytes keeps small parameters' moments in fp32 under the same name
    codes, _ = BITSANDBYTES_NAMES[moment]
    return codes in state and state[codes].dtype == torch.uint8


def _state_at(optimizer: Any, parameter: Tensor, step: int) -> dict[str, Any]:
    """The optimizer's state for a parameter, with its count set to `step`; made as the first step would, if missing."""
    state: dict[str, Any] = optimizer.state[parameter]
    if not state and hasattr(optimizer, "init_state"):
        # bitsandbytes' optimizers and HostAdamW8bit have this method. The zeros stand for the indices of the group and
        # of the parameter.
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
        state = optimizer.state[parameter]
    elif not state:
        # torch.optim.AdamW has no such method. Its fused and capturable steps read the count of steps on the device.
        on_device = optimizer.param_groups[0].get("fused") or optimizer.param_groups[0].get("capturable")
        state["step"] = torch.zeros((), device=parameter.device if on_device else "cpu")
        state.update({moment: torch.zeros_like(parameter, dtype=torch.float32) for moment in MOMENTS})
    if isinstance(state["step"], Tensor):
        state["step"].fill_(step)
    else:
        state["step"] = step
    return state
