"""Adam's two moments as checkpoints keep them: whatever optimizer wrote them, any other one can go on from them.

A kept moment is fp32 in the parameter's shape, or 8-bit as it was: `{"codes": uint8 [N], "absmax": fp32 [N/256],
"order": the dimensions from the outermost in memory to the innermost}`. In between it is fp32, flat, in the order of
the parameter's memory.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddpo_fast.engine.optimizers import flat
from ddpo_fast.ops.adamw8bit import dequantise, quantise

MOMENTS = ("exp_avg", "exp_avg_sq")
# bitsandbytes' names
CODES = {"exp_avg": ("state1", "absmax1"), "exp_avg_sq": ("state2", "absmax2")}
Kept: TypeAlias = Tensor | dict[str, Any]


def are_adams(optimizer: torch.optim.Optimizer) -> bool:
    """Whether what the optimizer keeps, or will keep, is a count of steps and Adam's moments under a known name."""
    group = optimizer.param_groups[0]
    return "betas" in group and not group.get("amsgrad", False)


def step_of(optimizer: torch.optim.Optimizer) -> int:
    """Steps that the optimizer has taken."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def get(optimizer: torch.optim.Optimizer, parameter: Tensor, moment: str) -> Tensor:
    """A moment of a parameter, [N]; zeros before the first step."""
    state = optimizer.state.get(parameter, {})
    codes, absmax = CODES[moment]
    if _is_quantised(state, moment):
        return dequantise(state[codes], state[absmax], signed=moment == "exp_avg")
    value = state.get(moment, state.get(codes))
    if value is None:
        return torch.zeros(parameter.numel(), device=parameter.device)
    return flat(value, like=parameter).float() if value.shape == parameter.shape else value.float().view(-1)


def put(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    values: dict[str, Kept],
    step: int,
    seen: Tensor | None = None,
) -> None:
    """Sets the moments of a parameter, as checkpoints keep them, and its count of steps.

    8-bit ones stay as they are where the optimizer has such in the same order, as codes of codes may be others.

    Args:
        seen: the parameter's values as the optimizer sees them in a step (default: as they are).
    """
    home = parameter.data
    parameter.data = home if seen is None else seen
    state = _state(optimizer, parameter, step)
    parameter.data = home
    for moment, value in values.items():
        codes, absmax = CODES[moment]
        if not _is_quantised(state, moment):
            flat(state[moment] if moment in state else state[codes]).copy_(restored(value, parameter, moment))
            continue
        if isinstance(value, dict) and value["order"] == _order(parameter):
            new_codes, scales = value["codes"], value["absmax"]
        else:
            exact = restored(value, parameter, moment).to(state[codes].device)
            new_codes, scales = quantise(exact, signed=moment == "exp_avg")
        flat(state[codes]).copy_(new_codes)
        state[absmax].copy_(scales)


def keep(optimizer: torch.optim.Optimizer, parameter: Tensor, moment: str) -> Kept:
    """A moment of a parameter for a checkpoint."""
    state = optimizer.state.get(parameter, {})
    if not _is_quantised(state, moment):
        return get(optimizer, parameter, moment).cpu().as_strided(parameter.shape, parameter.stride())
    codes, absmax = (flat(state[name]).cpu() for name in CODES[moment])
    return {"codes": codes, "absmax": absmax, "order": _order(parameter)}


def restored(kept: Kept, parameter: Tensor, moment: str) -> Tensor:
    """A checkpoint's moment, [N] fp32, in the order of the parameter's memory."""
    if isinstance(kept, Tensor):
        return flat(kept.float(), like=parameter)
    values = dequantise(kept["codes"], kept["absmax"], signed=moment == "exp_avg")
    outer_to_inner = values.view([parameter.shape[d] for d in kept["order"]])
    return flat(outer_to_inner.permute([kept["order"].index(d) for d in range(parameter.ndim)]), like=parameter)


def _order(parameter: Tensor) -> list[int]:
    return sorted(range(parameter.ndim), key=lambda d: -parameter.stride()[d])


def _is_quantised(state: dict[str, Any], moment: str) -> bool:
    codes, _ = CODES[moment]
    return codes in state and state[codes].dtype == torch.uint8


def _state(optimizer: Any, parameter: Tensor, step: int) -> dict[str, Any]:
    """The optimizer's state for a parameter, made as its first step would if there is none, and at `step`."""
    state: dict[str, Any] = optimizer.state[parameter]
    if not state and hasattr(optimizer, "init_state"):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
        state = optimizer.state[parameter]
    elif not state:
        on_device = optimizer.param_groups[0].get("fused") or optimizer.param_groups[0].get("capturable")
        state["step"] = torch.zeros((), device=parameter.device if on_device else "cpu")
        state.update({moment: torch.zeros_like(parameter, dtype=torch.float32) for moment in MOMENTS})
    if isinstance(state["step"], Tensor):
        state["step"].fill_(step)
    else:
        state["step"] = step
    return state
