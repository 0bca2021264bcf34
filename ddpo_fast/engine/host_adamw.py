"""AdamW for weights in host memory, with moments in 8 bits.

Adam keeps two moments of each weight's gradient: its mean and the mean of its square. In fp32 they take 8 bytes a
weight. Here they take 2: in blocks of 256 weights each value is one of 256 codes, times the block's fp32 scale
(blockwise quantisation, Dettmers et al., arXiv 2110.02861). The arithmetic is `ops.adamw8bit_`; this module is the
optimizer around it, in PyTorch's form, with bitsandbytes' states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpo_fast.ops import adamw8bit_, quantization_map
from ddpo_fast.ops.adamw8bit import BLOCK

# bitsandbytes' state_dict puts a parameter's tensors into a dict under this key, so that FSDP does not split them
_WRAPPED = "__bnb_optimizer_quant_state__"
_TENSORS = ("state1", "state2", "absmax1", "absmax2")


class HostAdamW8bit(torch.optim.Optimizer):
    """`bitsandbytes.optim.AdamW8bit` for fp32 parameters on the CPU: 6.03 bytes of memory a weight, its own 4 included.

    A parameter's state has bitsandbytes' keys and layout: `step`, `state1` and `state2` (uint8 codes in the parameter's
    shape, of the mean and the mean of squares), `absmax1` and `absmax2` (an fp32 scale for each 256 elements).
    `load_state_dict` accepts bitsandbytes' states. bitsandbytes accepts this class's states once `qmap1` and `qmap2`,
    the values that codes stand for, are added to each of them: `ops.quantization_map`.

    Args:
        params: fp32, on the CPU, contiguous; may be views of a flat buffer.
        lr, betas, eps, weight_decay: AdamW's, the decay decoupled.
        min_8bit_size: parameters with fewer elements keep fp32 moments, as in bitsandbytes.

    DeepSpeed accepts it as a client optimizer for `offload_optimizer`, with `"zero_force_ds_cpu_optimizer": false` and
    `"zero_allow_untested_optimizer": true`. DeepSpeed replaces the parameters by its own flat partitions after the
    optimizer has been made, so parameters are checked when they are first updated and not before.

    Raises `ValueError` for settings out of range, and in the first step for parameters of another kind.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas} but must be in [0, 1)")
        self.min_8bit_size = min_8bit_size
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with `p.grad` of every parameter that has one; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, p in self._parameters():
            if p.grad is not None:
                self._update(group, p, p.grad, None, 1.0)
        return loss

    @torch.no_grad()
    def step_with(
        self, grads: Sequence[Tensor | None], out: Sequence[Tensor | None] | None = None, grad_scale: float = 1.0
    ) -> None:
        """One step with these gradients, which may be half precision, in place of `p.grad`.

        Args:
            grads: one for each parameter, in the order of `param_groups`: fp32, fp16 or bf16 on the CPU, of its size.
                A parameter whose gradient is None stays as it is.
            out: one for each parameter, which the new weights are written to: fp16, bf16 or fp32, contiguous. None for
                no copy.
            grad_scale: what gradients are multiplied by, to unscale and to clip them.
        """
        outs = [None] * len(grads) if out is None else out
        for (group, p), grad, copy in zip(self._parameters(), grads, outs, strict=True):
            if grad is not None:
                self._update(group, p, grad, copy, grad_scale)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class or of bitsandbytes' AdamW8bit.

        Raises `ValueError` for states that do not fit the parameters.
        """
        # PyTorch's method would cast the states to the parameter's dtype, fp32, but the codes must stay uint8
        super().load_state_dict({**state_dict, "state": {}})
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for name, (_, p) in zip(names, self._parameters(), strict=True):
            if name in state_dict["state"]:
                self.state[p] = _checked_state(name, state_dict["state"][name], p)

    def init_state(self, group: dict[str, Any], p: Tensor, *place: int) -> None:
        """Makes a parameter's state before its first step.

        Args:
            place: ignored; bitsandbytes' method of this name takes the indices of the group and the parameter.

        Raises `ValueError` for a parameter that is not contiguous fp32 on the CPU.
        """
        if p.dtype != torch.float32 or p.device.type != "cpu" or not p.is_contiguous():
            raise ValueError(f"a parameter is {p.dtype} on {p.device}, but must be contiguous fp32 on the CPU")
        self.state[p] = _zero_state(p, eight_bits=p.numel() >= self.min_8bit_size)

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield group, p

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor, out: Tensor | None, grad_scale: float) -> None:
        if not self.state[p]:
            self.init_state(group, p)
        state = self.state[p]
        state["step"] += 1
        settings = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        beta1, beta2 = group["betas"]
        update: Callable[..., None] = adamw8bit_ if "absmax1" in state else _adamw_
        update(
            p.detach().view(-1),
            *(state[name].view(-1) for name in _TENSORS if name in state),
            grad.detach().reshape(-1),
            None if out is None else out.view(-1),
            beta1=beta1,
            beta2=beta2,
            step=state["step"],
            grad_scale=grad_scale,
            **settings,
        )


def _zero_state(p: Tensor, eight_bits: bool) -> dict[str, Any]:
    # the codes need no particular value: with a scale of zero, every code stands for zero
    dtype = torch.uint8 if eight_bits else torch.float32
    state: dict[str, Any] = {"step": 0}
    state |= {name: torch.zeros_like(p, dtype=dtype, requires_grad=False) for name in ("state1", "state2")}
    if eight_bits:
        state |= {name: torch.zeros(-(-p.numel() // BLOCK)) for name in ("absmax1", "absmax2")}
    return state


def _checked_state(name: Any, saved: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """A copy of a parameter's saved state, in the shape that it was saved in.

    Raises `ValueError` if a tensor has another size or dtype than this class's, or if codes stand for other values.
    """
    saved = {**saved, **saved.get(_WRAPPED, {})}
    eight_bits = "absmax1" in saved
    for moment, signed in (("qmap1", True), ("qmap2", False)):
        if moment in saved and not torch.equal(saved[moment].cpu(), quantization_map(signed)):
            raise ValueError(f"the state of parameter {name} has another {moment} than ours")
    state: dict[str, Any] = {"step": int(saved["step"])}
    for key, empty in _zero_state(p, eight_bits).items():
        if key == "step":
            continue
        if saved[key].numel() != empty.numel() or saved[key].dtype != empty.dtype:
            found, wanted = (f"{t.numel()} x {t.dtype}" for t in (saved[key], empty))
            raise ValueError(f"{key} of parameter {name} is {found} but must be {wanted}")
        state[key] = saved[key].to("cpu", copy=True)
    return state


def _adamw_(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    out: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    """What `adamw8bit_` computes, with fp32 moments.

    With c1 = 1 - beta1^step and c2 = 1 - beta2^step:
    p <- (1 - lr wd) p - lr (m / c1) / (sqrt(v / c2) + eps)

    The corrections c1 and c2 make up for moments that start at zero: after one step m is only (1 - beta1) times the
    gradient. Here numerator and denominator of the fraction are multiplied by sqrt(c2), so that no division of v is
    needed: lr (sqrt(c2) / c1) m / (sqrt(v) + sqrt(c2) eps).
    """
    grad_fp32 = grad.float() * grad_scale
    m.lerp_(grad_fp32, 1 - beta1)
    v.mul_(beta2).addcmul_(grad_fp32, grad_fp32, value=1 - beta2)
    correction = math.sqrt(1 - beta2**step)
    # AdamW's decay is decoupled: it shrinks the weight itself, and is not part of the gradient
    p.mul_(1 - lr * weight_decay)
    p.addcdiv_(m, v.sqrt().add_(eps * correction), value=-lr * correction / (1 - beta1**step))
    if out is not None:
        out.copy_(p)
