"""The check of an op's backends: their error against fp64 is compared with that of PyTorch in the same precision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ddpo_fast.ops.backend import BACKENDS, OPS

# on a machine with a GPU the same tests run compiled kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)


def backends_of(op: str) -> list[str]:
    """The backends of the op that are written for the device."""
    return [name for name in BACKENDS if OPS[op].has(name, DEVICE)]


def name_of(value: object) -> str | None:
    """A readable id for dtypes in `pytest.mark.parametrize`."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def in_layout(tensor: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def largest(tensor: torch.Tensor) -> float:
    return tensor.detach().double().abs().max().item() if tensor.numel() else 0.0


def assert_as_exact_as_plain(
    actual: Sequence[torch.Tensor], plain: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], layers: int = 4
) -> None:
    """Each error is at most twice plain PyTorch's, plus a floor of sqrt(`layers`) roundings of the largest exact value.

    Independent roundings of so many layers in a row add up to that. An op is counted as a few layers.

    The floor is needed where plain PyTorch's result happens to be exact: kernels sum in another order, Triton's `exp`
    and `log` are exact to 2 units in the last place, and interpreted Triton truncates to bf16 where hardware rounds.
    """
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert a.shape == e.shape, f"output {i} has shape {tuple(a.shape)}, not {tuple(e.shape)}"
        assert a.dtype == p.dtype, f"output {i} is {a.dtype}, plain PyTorch's is {p.dtype}"
        assert torch.isfinite(a).all(), f"output {i} has values that are not finite"
        allowed = 2 * largest(p.double() - e.double()) + math.sqrt(layers) * torch.finfo(p.dtype).eps * largest(e)
        error = largest(a.double() - e.double())
        assert error <= allowed, f"output {i}: error {error:.3g}, {allowed:.3g} allowed"
