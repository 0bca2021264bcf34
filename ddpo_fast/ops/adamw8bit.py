"""AdamW for fp32 weights in host memory, its moments in 8 bits each: one pass over all that it reads and writes.

The moments are laid out as bitsandbytes lays them out: in blocks of 256 values, a code for each value and an fp32
scale for each block. A code stands for a value of a map, times the scale; the maps are those of Dettmers et al.,
8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861), signed for the mean of gradients and unsigned for the
mean of their squares.
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
# what plain PyTorch updates at a time, so that its temporary memory is bounded
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
    """`p <- (1 - lr wd) p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)`, and p to `out`.

    `g = grad_scale grad`, `m <- beta1 m + (1 - beta1) g`, `v <- beta2 v + (1 - beta2) g^2`; the update is computed with
    the moments as they are before they are rounded to 8 bits, as in bitsandbytes.

    Args:
        master: [N] fp32, contiguous; updated in place. A slice of a larger buffer may begin anywhere, but blocks are
            counted from its own beginning: slices at multiples of 256 can be updated together or apart.
        codes1, codes2: [N] uint8, the moments' codes; updated in place. All zeros, with scales of zero, to begin with.
        absmax1, absmax2: [ceil(N / 256)] fp32, the blocks' scales; updated in place.
        grad: [N] fp32, fp16 or bf16. Must be finite: NaN and infinity make the whole block NaN, from the next step on.
        out: [N] fp16, bf16 or fp32, gets the new weights, rounded to nearest even.
        step: 1 for the first.
        grad_scale: what unscales and clips the gradient.

    The result does not depend on the number of threads, `torch.get_num_threads()`. A moment's scale is that at which
    both its largest and its lowest value are represented (the signed map ends at 1 and -0.993, so bitsandbytes, which
    takes the largest absolute value, loses 0.7 % of a negative extreme each step): quantising again changes nothing.
    A mean of squares is never rounded to zero, which would let its weight leap by lr m / eps. Scales below 1.2e-38 are
    taken as zero. Raises `ValueError` for shapes, dtypes and layouts that do not fit.
    """
    _check(master, codes1, codes2, absmax1, absmax2, grad, out)
    if step < 1:
        raise ValueError(f"step is {step} but the first is 1")
    correction = math.sqrt(1 - beta2**step)
    device = str(master.device)
    OP(
        *(master, codes1, codes2, absmax1, absmax2, grad, out),
        _maps(device),
        _decades(device),
        beta1,
        beta2,
        (1 - beta1) * grad_scale,
        # squared with the gradient: no square of a large gradient overflows before it is made small
        math.sqrt(1 - beta2) * grad_scale,
        1 - lr * weight_decay,
        eps * correction,
        lr * correction / (1 - beta1**step),
    )


def quantization_map(signed: bool) -> Tensor:
    """The 256 values of the codes, ascending, fp32: bitsandbytes' `create_dynamic_map`.

    Zero, one, and seven decades up to one (and down to minus one) that double in resolution: each is divided evenly,
    and a value is the middle of its part.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade + 1 - DECADES)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def quantization_decades(signed: bool) -> Tensor:
    """[4, 8] fp32: where decades of sizes begin, and the slope, offset and last code of each; the last is one alone.

    Codes are counted from that of zero. Within a decade the nearest value's is `floor(slope size + offset)`; a decade
    begins midway between two values, where the line is one too high for the decade below it: hence its last code.
    """
    values = quantization_map(signed)
    sizes = values[values >= 0].tolist()
    rows = []
    for decade in range(DECADES):
        parts = 2 ** (decade + (not signed))
        first = parts - (not signed)
        begin = (sizes[first - 1] + sizes[first]) / 2
        # zero is a ninth of a decade's width below its lower edge
        rows.append([begin, parts * 10 ** (DECADES - 1 - decade) / 0.9, first - parts / 9, first + parts - 1])
    if not signed:
        # a mean of squares that is rounded to zero beside a mean that is not makes a step of lr m / eps: never zero
        rows[0][:3] = [0.0, 1 / ((sizes[1] + sizes[2]) / 2), 1.0]
    last = len(sizes) - 1
    rows.append([(sizes[-2] + sizes[-1]) / 2, 0, last, last])
    return torch.tensor(rows, dtype=torch.float32).T.contiguous()


def quantise(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes [N] uint8, scales [ceil(N / 256)]) of values [N] fp32; unsigned ones must be zero or more.

    The codes of the nearest values, but for an unsigned value near zero: its code is the least above zero's.
    """
    pad = -len(values) % BLOCK
    blocks = torch.nn.functional.pad(values, (0, pad)).view(-1, BLOCK)
    device = str(values.device)
    scales = blocks.amax(dim=1)
    if signed:
        scales = torch.maximum(scales, blocks.amin(dim=1) / _maps(device)[0, 0])
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, scales)
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    scaled = blocks * inverse[:, None]
    threshold, slope, offset, last = _decades(device)[0 if signed else 1]
    sizes = scaled.abs()
    # one to the left of a decade's number is what rounds to zero
    decade = torch.bucketize(sizes, threshold, right=True) - 1
    line = decade.clamp(min=0)
    steps = torch.minimum(sizes * slope[line] + offset[line], last[line]).int()
    steps = torch.where(decade < 0, 0, steps)
    codes = torch.where(scaled < 0, 127 - steps, 127 + steps) if signed else steps
    return codes.to(torch.uint8).flatten()[: len(values)], scales


def dequantise(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The fp32 values [N] of N codes of any shape and scales [ceil(N / 256)]."""
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


OP = Op("adamw8bit", _reference, None, csrc=_csrc, csrc_devices=("cpu",))
