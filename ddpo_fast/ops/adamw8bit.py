"""AdamW for fp32 weights in host memory with moments of 8 bits each, in one pass over memory.

A moment is stored in blocks of 256 values, in bitsandbytes' layout: a uint8 code for each value and an fp32 scale for
each block. A code is an index into a table of 256 values between -1 and 1 (the map), and the value it stands for is
`map[code] * scale`. The maps are those of Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv
2110.02861): a signed one for the first moment (the mean of gradients) and an unsigned one for the second (the mean of
their squares).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ddpo_fast.ops.backend import KERNEL_DTYPES, Op

BLOCK = 256
DECADES = 7
# how many weights the reference updates at a time, which bounds its temporary memory
PIECE = 4096 * BLOCK


def adamw8bit_(
    master: Tensor,
    codes1: Tensor,
    codes2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    grad: Tensor,
    out: Tensor | None = None,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """`p <- (1 - lr wd) p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)`; p is copied to `out`.

    p is `master`, `g = grad_scale grad`, `m <- beta1 m + (1 - beta1) g` and `v <- beta2 v + (1 - beta2) g^2`. The
    update uses the moments before they are rounded to 8 bits, as bitsandbytes does.

    Args:
        master: [N] fp32, contiguous; updated in place. It may be a slice of a larger buffer. Blocks are counted from
            the slice's beginning, so a buffer may be updated in slices if these begin at multiples of 256.
        codes1, codes2: [N] uint8, the codes of the first and the second moment; updated in place. Zeros at the start.
        absmax1, absmax2: [ceil(N / 256)] fp32, the blocks' scales; updated in place. Zeros at the start.
        grad: [N] fp32, fp16 or bf16. Must be finite: NaN or infinity makes the whole block NaN from the next step on.
        out: [N] fp16, bf16 or fp32; receives the new weights, rounded to nearest even.
        step: the number of this update, 1 for the first.
        grad_scale: multiplies the gradient; the inverse loss scale times the factor of gradient clipping.

    The result does not depend on the number of threads (`torch.get_num_threads()`).

    Three details differ from bitsandbytes. The scale of the first moment is chosen such that both the largest and the
    lowest value of a block have a code. The signed map ends at 1 and at -0.993, so with the largest absolute value as
    the scale, a negative value of that size would lose 0.7 % in every step. A second moment is never rounded to zero,
    because with a first moment that is not zero, the update would then be lr m / eps. Scales below 1.2e-38 count as
    zero.

    Raises `ValueError` for shapes, dtypes and layouts that do not fit, and for a `step` below 1.
    """
    # long by its operands and what each may be; what follows are the checks of them and one call
    _check(master, codes1, codes2, absmax1, absmax2, grad, out)
    if step < 1:
        raise ValueError(f"step is {step} but the first is 1")
    # The update's numerator `m / (1 - beta1^step)` and denominator `sqrt(v / (1 - beta2^step)) + eps`, both multiplied
    # by `correction`, are `m * correction / (1 - beta1^step)` and `sqrt(v) + eps * correction`. In this form `v` need
    # not be divided for each weight.
    correction = math.sqrt(1 - beta2**step)
    device = str(master.device)
    OP(
        *(master, codes1, codes2, absmax1, absmax2, grad, out),
        _maps(device),
        _decades(device),
        beta1,
        beta2,
        (1 - beta1) * grad_scale,
        # The op squares the product of this factor and the gradient. The square of a large gradient alone could
        # overflow.
        math.sqrt(1 - beta2) * grad_scale,
        1 - lr * weight_decay,
        eps * correction,
        lr * correction / (1 - beta1**step),
    )


def quantization_map(signed: bool) -> Tensor:
    """The value of each of the 256 codes, ascending, fp32; the same as bitsandbytes' `create_dynamic_map`.

    The values are 0, 1, and those of seven decades, (0.1, 1], (0.01, 0.1] and so on, with their negatives if signed.
    Each decade is divided into equal parts, twice as many as the next lower decade has, and the values are the middles
    of the parts.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade + 1 - DECADES)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def quantization_decades(signed: bool) -> Tensor:
    """The map's decades as straight lines, which find the nearest code by arithmetic: [4, 8] fp32.

    There is a column for each of eight decades; the eighth holds only the value 1. The rows are the size, |value| /
    scale, at which the decade begins, the slope and the offset of its line, and its last code. Codes are counted from
    the code of zero. Within a decade, the code of the nearest value is `min(floor(slope size + offset), last)`. A
    decade begins midway between the last value of the lower decade and its own first value. Just below that point the
    lower decade's line gives a code that is one too high; the minimum with its last code corrects that.
    """
    values = quantization_map(signed)
    sizes = values[values >= 0].tolist()
    rows = []
    for decade in range(DECADES):
        parts = 2 ** (decade + (not signed))
        first = parts - (not signed)
        begin = (sizes[first - 1] + sizes[first]) / 2
        # a decade is 0.9 units wide and begins 0.1 units above zero: zero is parts / 9 parts below its lower edge
        rows.append([begin, parts * 10 ** (DECADES - 1 - decade) / 0.9, first - parts / 9, first + parts - 1])
    if not signed:
        # A second moment never rounds to zero (see `adamw8bit_`): even size 0 gets the code after that of zero.
        rows[0][:3] = [0.0, 1 / ((sizes[1] + sizes[2]) / 2), 1.0]
    last = len(sizes) - 1
    rows.append([(sizes[-2] + sizes[-1]) / 2, 0, last, last])
    return torch.tensor(rows, dtype=torch.float32).T.contiguous()


def quantise(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantises values [N] fp32 to (codes [N] uint8, scales [ceil(N / 256)] fp32); unsigned values must be >= 0.

    Each code is that of the nearest value of the map, except that an unsigned value near zero gets the lowest code
    above zero's.
    """
    pad = -len(values) % BLOCK
    blocks = torch.nn.functional.pad(values, (0, pad)).view(-1, BLOCK)
    device = str(values.device)
    scales = blocks.amax(dim=1)
    if signed:
        # the map's lowest value is -0.993, so a large negative value needs a scale above its absolute value
        scales = torch.maximum(scales, blocks.amin(dim=1) / _maps(device)[0, 0])
    # the inverse of a subnormal scale could be infinite
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, scales)
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    scaled = blocks * inverse[:, None]
    threshold, slope, offset, last = _decades(device)[0 if signed else 1]
    sizes = scaled.abs()
    # -1 for values that round to zero
    decade = torch.bucketize(sizes, threshold, right=True) - 1
    line = decade.clamp(min=0)
    steps = torch.minimum(sizes * slope[line] + offset[line], last[line]).int()
    steps = torch.where(decade < 0, 0, steps)
    codes = torch.where(scaled < 0, 127 - steps, 127 + steps) if signed else steps
    return codes.to(torch.uint8).flatten()[: len(values)], scales


def dequantise(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The fp32 values [N] of codes (N of them, in any shape) and scales [ceil(N / 256)]."""
    values = _maps(str(codes.device))[0 if signed else 1][codes.flatten().int()]
    return values * scales.repeat_interleave(BLOCK)[: codes.numel()]


@functools.cache
def _maps(device: str) -> Tensor:
    return torch.stack([quantization_map(signed) for signed in (True, False)]).to(device)


@functools.cache
def _decades(device: str) -> Tensor:
    return torch.stack([quantization_decades(signed) for signed in (True, False)]).to(device)


def _check(
    master: Tensor, codes1: Tensor, codes2: Tensor, absmax1: Tensor, absmax2: Tensor, grad: Tensor, out: Tensor | None
) -> None:
    n, float32, uint8 = master.numel(), (torch.float32,), (torch.uint8,)
    blocks = -(-n // BLOCK)
    wanted: dict[str, tuple[Tensor, int, tuple[torch.dtype, ...]]] = {
        "master": (master, n, float32),
        "codes1": (codes1, n, uint8),
        "codes2": (codes2, n, uint8),
        "absmax1": (absmax1, blocks, float32),
        "absmax2": (absmax2, blocks, float32),
        "grad": (grad, n, KERNEL_DTYPES),
    }
    if out is not None:
        wanted["out"] = (out, n, KERNEL_DTYPES)
    for name, (tensor, size, dtypes) in wanted.items():
        if tensor.shape != (size,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} but must have ({size},)")
        if tensor.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')} but must be {allowed}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
        if tensor.device != master.device:
            raise ValueError(f"{name} is on {tensor.device} but master on {master.device}")


# the definition


def _reference(
    master: Tensor,
    codes1: Tensor,
    codes2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    grad: Tensor,
    out: Tensor | None,
    maps: Tensor,
    decades: Tensor,
    *scalars: float,
) -> None:
    for begin in range(0, master.numel(), PIECE):
        at, blocks = slice(begin, begin + PIECE), slice(begin // BLOCK, (begin + PIECE) // BLOCK)
        pieces = (master[at], codes1[at], codes2[at], absmax1[blocks], absmax2[blocks], grad[at])
        _reference_piece(*pieces, None if out is None else out[at], *scalars)


def _reference_piece(
    master: Tensor,
    codes1: Tensor,
    codes2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    grad: Tensor,
    out: Tensor | None,
    beta1: float,
    beta2: float,
    rest1: float,
    rest2: float,
    decay: float,
    eps: float,
    step_size: float,
) -> None:
    wide = grad.float()
    m = dequantise(codes1, absmax1, signed=True) * beta1 + wide * rest1
    v = dequantise(codes2, absmax2, signed=False) * beta2 + (wide * rest2).square()
    master.mul_(decay).sub_(step_size * (m / (v.sqrt() + eps)))
    if out is not None:
        out.copy_(master)
    for values, codes, absmax, signed in ((m, codes1, absmax1, True), (v, codes2, absmax2, False)):
        found, scales = quantise(values, signed)
        codes.copy_(found)
        absmax.copy_(scales)


def _csrc(*arguments: Any) -> None:
    torch.ops.ddpo_fast_csrc.adamw8bit(*arguments)


OP = Op("adamw8bit", _reference, None, csrc=_csrc)
