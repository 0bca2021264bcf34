"""GroupNorm followed by SiLU, forward and backward in one launch each, for contiguous and channels_last images.

The norm is of x, or of a sum with a residual or a concatenation of two tensors, which is then stored. A program
normalises whole groups of one image. It reads the groups twice: for the statistics, and to normalise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ddpo_fast_kernels.groups import addend_of, in_parts, lanes, load_sum, normalised, per_channel, per_group, tiling
from ddpo_fast_kernels.launch import counters_of, share_of, sum_parts, tickets


class Norm(NamedTuple):
    """The parameters weight [C] and bias [C], and the fp32 statistics mean [N, G] and rstd = 1 / std [N, G]."""

    weight: Any
    bias: Any
    mean: Any
    rstd: Any


# In one piece, as all of it works on the values of one tile, and a quarter of the lines are arguments.
@triton.jit
def groupnorm_silu_fwd_kernel(
    x_ptr,
    beside_ptr,
    residual_ptr,
    addend_ptr,
    later_ptr,
    y_ptr,
    s_ptr,
    copy_ptr,
    norm,
    width,
    channels,
    pixels,
    addend_step,
    eps,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    real, channel, first, step, member = lanes(channels, pixels, GROUPS, GROUP_SIZE, BLOCK_C, CHANNELS_LAST)
    row = tl.arange(0, BLOCK_P)
    # of a concatenation the first part has one only
    has_addend = real if beside_ptr is None else real & (channel < width)
    addend = addend_of(addend_ptr, addend_step, channel, has_addend)
    if beside_ptr is not None:
        parts, steps = in_parts(x_ptr, beside_ptr, width, channels, pixels, channel, BLOCK_C, CHANNELS_LAST)

    # Welford's recurrence for mean and sum of squared distances, separately in each element of the tile. The variance
    # E[x^2] - E[x]^2 would be cheaper, but it loses all digits to cancellation where the mean is large.
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, pixels, BLOCK_P):
        pixel = start + row
        mask = (pixel < pixels)[:, None] & real[None, :]
        offset = first[None, :] + pixel[:, None] * step
        if beside_ptr is not None:
            x = tl.load(parts + pixel[:, None] * steps, mask=mask, other=0.0).to(tl.float32) + addend
            # the backward pass reads the rounded concatenation
            x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
        else:
            x = load_sum(x_ptr, residual_ptr, addend, offset, mask)
        if s_ptr is not None:
            tl.store(s_ptr + offset, x.to(s_ptr.dtype.element_ty), mask=mask)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / (start // BLOCK_P + 1))
        squares += delta * (x - mean)

    # Chan's formula merges the statistics of parts: the squares of a union are the sum of the parts' squares plus, for
    # each part, its count times the squared distance of its mean from the union's mean. First the tile's rows are
    # merged, which have read `count` pixels each (the last tile may be incomplete), then the channels of a group.
    # row r of the tile has read the pixels r, r + BLOCK_P, r + 2 BLOCK_P, ...
    count = ((pixels - row + BLOCK_P - 1) // BLOCK_P).to(tl.float32)[:, None]
    channel_mean = tl.sum(count * mean, axis=0) / pixels
    difference = mean - channel_mean[None, :]
    channel_squares = tl.sum(squares + count * difference * difference, axis=0)
    group_mean = per_group(member, channel_mean) / GROUP_SIZE
    centre = per_channel(member, group_mean)
    distance = channel_mean - centre
    variance = per_group(member, channel_squares + pixels * distance * distance) / (GROUP_SIZE * pixels)
    rstd = 1.0 / tl.sqrt(variance + eps)
    statistic = tl.program_id(1) * (channels // GROUP_SIZE) + tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    tl.store(norm.mean + statistic, group_mean)
    tl.store(norm.rstd + statistic, rstd)

    weight = tl.load(norm.weight + channel, mask=real, other=0.0).to(tl.float32)
    bias = tl.load(norm.bias + channel, mask=real, other=0.0).to(tl.float32)
    scale = weight * per_channel(member, rstd)
    if s_ptr is not None:
        # other threads may have stored what a thread reads
        tl.debug_barrier()
    if copy_ptr is not None:
        later = tl.load(later_ptr + channel, mask=real, other=0.0).to(tl.float32)
    # from the last tile to the first, because the caches still hold the tiles that the first pass read last
    for done in range(0, pixels, BLOCK_P):
        pixel = (pixels - 1) // BLOCK_P * BLOCK_P - done + row
        mask = (pixel < pixels)[:, None] & real[None, :]
        offset = first[None, :] + pixel[:, None] * step
        if s_ptr is not None:
            x = tl.load(s_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        else:
            x = load_sum(x_ptr, residual_ptr, addend, offset, mask)
        if copy_ptr is not None:
            tl.store(copy_ptr + offset, (x + later[None, :]).to(copy_ptr.dtype.element_ty), mask=mask)
        y = (x - centre[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            y *= tl.sigmoid(y)
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


# In one piece, as all of it works on the values of one tile, and a quarter of the lines are arguments.
@triton.jit
def groupnorm_silu_bwd_kernel(
    x_ptr,
    addend_ptr,
    grad_ptr,
    skip_ptr,
    dx_ptr,
    dbeside_ptr,
    daddend_ptr,
    parts_ptr,
    sums_ptr,
    tickets,
    norm,
    width,
    channels,
    pixels,
    addend_step,
    share,
    counters,
    AFFINE: tl.constexpr,
    SHARED: tl.constexpr,
    LATER: tl.constexpr,
    ONE_SHARE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """AFFINE, SHARED, LATER: which vectors that are the same for all images get a gradient: weight and bias, the
    addend, and what was added to the copy of the norm's input; in this order. With `dbeside_ptr`, x is a concatenation,
    and the gradient of its channels from `width` on is stored there."""
    real, channel, first, step, member = lanes(channels, pixels, GROUPS, GROUP_SIZE, BLOCK_C, CHANNELS_LAST)
    row = tl.arange(0, BLOCK_P)
    image = tl.program_id(1)
    statistic = image * (channels // GROUP_SIZE) + tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    mean = per_channel(member, tl.load(norm.mean + statistic))
    rstd = per_channel(member, tl.load(norm.rstd + statistic))
    weight = tl.load(norm.weight + channel, mask=real, other=0.0).to(tl.float32)
    bias = tl.load(norm.bias + channel, mask=real, other=0.0).to(tl.float32)
    addend = addend_of(addend_ptr, addend_step, channel, real)

    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, pixels, BLOCK_P):
        pixel = start + row
        mask = (pixel < pixels)[:, None] & real[None, :]
        offset = first[None, :] + pixel[:, None] * step
        xhat, grad = normalised(x_ptr, addend, grad_ptr, offset, mask, mean, rstd, weight, bias, SILU)
        sums += grad
        products += grad * xhat
    channel_sum = tl.sum(sums, axis=0)
    channel_product = tl.sum(products, axis=0)
    # the images' gradients of the vectors, [V, N, C]
    vector_step = tl.num_programs(1) * channels
    if AFFINE:
        tl.store(parts_ptr + image * channels + channel, channel_product, mask=real)
        tl.store(parts_ptr + vector_step + image * channels + channel, channel_sum, mask=real)

    # Let h = grad * weight be the gradient with respect to xhat. xhat does not change if a constant is added to x or x
    # is scaled (up to eps), so dx has no component along the constant vector or along xhat. With means over the group,
    # dx = rstd * (h - mean(h) - xhat * mean(h * xhat)).
    count = GROUP_SIZE * pixels
    along_one = per_channel(member, per_group(member, weight * channel_sum) / count)
    along_x = per_channel(member, per_group(member, weight * channel_product) / count)
    if dbeside_ptr is not None:
        parts, steps = in_parts(dx_ptr, dbeside_ptr, width, channels, pixels, channel, BLOCK_C, CHANNELS_LAST)
    of_addend = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    of_later = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    # from the last tile to the first, as in the forward pass
    for done in range(0, pixels, BLOCK_P):
        pixel = (pixels - 1) // BLOCK_P * BLOCK_P - done + row
        mask = (pixel < pixels)[:, None] & real[None, :]
        offset = first[None, :] + pixel[:, None] * step
        xhat, grad = normalised(x_ptr, addend, grad_ptr, offset, mask, mean, rstd, weight, bias, SILU)
        dx = (grad * weight[None, :] - along_one[None, :] - xhat * along_x[None, :]) * rstd[None, :]
        if skip_ptr is not None:
            skip = tl.load(skip_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            dx += skip
            if LATER:
                of_later += skip
        if SHARED or daddend_ptr is not None:
            of_addend += tl.where(mask, dx, 0.0)
        if dbeside_ptr is not None:
            tl.store(parts + pixel[:, None] * steps, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if daddend_ptr is not None:
        at = daddend_ptr + image * channels + channel
        tl.store(at, tl.sum(of_addend, axis=0).to(daddend_ptr.dtype.element_ty), mask=real)
    if parts_ptr is not None:
        at = parts_ptr + 2 * AFFINE * vector_step + image * channels + channel
        if SHARED:
            tl.store(at, tl.sum(of_addend, axis=0), mask=real)
        if LATER:
            tl.store(at + SHARED * vector_step, tl.sum(of_later, axis=0), mask=real)
        sum_parts(
            parts_ptr,
            sums_ptr,
            tickets + tl.program_id(0) * counters,
            image,
            tl.num_programs(1),
            share,
            channels,
            vector_step,
            channels,
            channel,
            real,
            2 * AFFINE + SHARED + LATER,
            ONE_SHARE,
            BLOCK_P,
            BLOCK_C,
        )


def groupnorm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
    addend: torch.Tensor | None,
    residual: torch.Tensor | None,
    later: torch.Tensor | None,
    beside: torch.Tensor | None,
    y: torch.Tensor,
    s: torch.Tensor | None,
    copy: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """Fills `y`, which has the dense layout of `x` [N, C, ...] (not empty), and the fp32 `mean` and `rstd` [N, G].

    `addend` is [N, C] or [1, C]. With a `residual`, in the layout of `x`, the norm is of the sum, which fills `s` if
    that is given. With `later` [C], `copy`, in the same layout, is what was normalised plus that. With `beside`, in
    the layout of `x`, the norm is of the channels of both, which fill `s`; the addend is that of `x`.
    """
    images, channels, pixels = y.shape[0], y.shape[1], math.prod(y.shape[2:])
    grid, tile, warps = tiling(images, channels, pixels, mean.shape[1], y.element_size(), not y.is_contiguous())
    norm = Norm(weight.contiguous(), bias.contiguous(), mean, rstd)
    addend, step = _rows(addend)
    later = None if later is None else later.contiguous()
    with torch.cuda.device_of(x):
        groupnorm_silu_fwd_kernel[grid](
            *(x, beside, residual, addend, later, y, s, copy, norm, x.shape[1], channels, pixels, step, eps),
            SILU=silu,
            **tile,
            num_warps=warps,
        )


def groupnorm_silu_backward(
    x: torch.Tensor,
    grad: torch.Tensor,
    skip: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    addend: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
    needs: Sequence[bool],
    dx: torch.Tensor,
    dbeside: torch.Tensor | None,
    daddend: torch.Tensor | None,
    sums: torch.Tensor | None,
) -> None:
    """Fills `dx` and, if given, `dbeside`, `daddend` [N, C] and `sums` [V, C].

    `x`, `grad`, `skip` and `dx` have the same dense layout; `skip` is added to dx. With `dbeside`, x was made of two
    tensors, and `dx` has the channels of the first only. `sums` gets those gradients that
    `needs` asks for: of weight and bias, of an addend that all images share, and of `later`, the sum of `skip`.
    """
    images, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    grid, tile, warps = tiling(images, channels, pixels, mean.shape[1], x.element_size(), not x.is_contiguous())
    norm = Norm(weight.contiguous(), bias.contiguous(), mean, rstd)
    addend, step = _rows(addend)
    counters = counters_of(images)
    parts = counting = None
    if sums is not None:
        parts = torch.empty((len(sums), images, channels), dtype=torch.float32, device=x.device)
        counting = tickets(x.device, grid[0] * counters)
    with torch.cuda.device_of(x):
        groupnorm_silu_bwd_kernel[grid](
            x,
            addend,
            grad,
            skip,
            dx,
            dbeside,
            daddend,
            parts,
            sums,
            counting,
            norm,
            dx.shape[1],
            channels,
            pixels,
            step,
            share_of(images),
            counters,
            AFFINE=needs[0],
            SHARED=needs[1],
            LATER=needs[2],
            ONE_SHARE=share_of(images) == images,
            SILU=silu,
            **tile,
            num_warps=warps,
        )


def _rows(addend: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """The addend with dense rows, and the step from an image's to the next's: 0 if all have the same."""
    if addend is None:
        return None, 0
    # rows may be parts of longer ones
    addend = addend if addend.stride(1) == 1 else addend.contiguous()
    return addend, 0 if len(addend) == 1 else addend.stride(0)


def ahead_of_time() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any], int]]:
    """Yields (name, kernel, signature, constants, warps) of SD 1.5's norms for 48 images."""
    shapes = [(4096, 320), (4096, 640), (4096, 960), (1024, 1280), (256, 1920), (64, 2560)]
    for dtype, itemsize in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
        x = f"*{dtype}"
        norm = Norm(x, x, "*fp32", "*fp32")
        sizes = {"width": "i32", "channels": "i32", "pixels": "i32", "addend_step": "i32"}
        for pixels, channels in shapes if dtype == "fp16" else ((4096, 320), (1024, 1280)):
            _, tile, warps = tiling(48, channels, pixels, 32, itemsize, channels_last=True)
            name = f"{dtype} {channels} channels, {pixels} pixels"
            # a residual block's first norm has a skip connection, and in up blocks two tensors, its second an addend;
            # the norm of a transformer has a residual and a later bias; all are trained, or none is
            for kind, given in (
                ("fwd", ""),
                ("fwd addend", "addend"),
                ("fwd parts", "beside addend s"),
                ("fwd sum", "residual addend later s copy"),
                ("fwd sum, frozen", "residual addend later copy"),
                ("bwd trained", "skip parts sums tickets"),
                ("bwd addend, trained", "addend daddend parts sums tickets"),
                ("bwd parts, trained", "skip dbeside parts sums tickets"),
                ("bwd parts, frozen", "skip dbeside"),
                ("bwd sum, trained", "skip parts sums tickets"),
                ("bwd frozen", "skip"),
                ("bwd addend, frozen", "addend"),
            ):
                direction, _, rest = kind.partition(" ")
                forward, summed = direction == "fwd", rest.startswith("sum")
                # up blocks have all of these widths but one, and transformers only some
                if rest.startswith("parts") and (channels == 320) == (dtype == "fp16"):
                    continue
                if summed and channels not in ((320, 640, 1280) if dtype == "fp16" else (320,)):
                    continue
                optional = "addend skip dbeside daddend parts sums tickets"
                optional = "beside residual addend later s copy" if forward else optional
                order = "x beside residual addend later y s copy"
                order = order if forward else "x addend grad skip dx dbeside daddend parts sums tickets"
                names = {name: name if name == "tickets" else f"{name}_ptr" for name in order.split()}
                absent = {names[name]: None for name in optional.split() if name not in given.split()}
                types = {"parts": "*fp32", "tickets": "*i32"}
                constants = {**tile, "SILU": True}
                last = {"eps": "fp32"} if forward else {"share": "i32", "counters": "i32"}
                if not forward:
                    shared = summed or rest == "parts, trained"
                    constants |= {"AFFINE": "parts" in given, "SHARED": shared, "LATER": summed, "ONE_SHARE": True}
                signature: dict[str, Any] = {names[name]: types.get(name, x) for name in names}
                signature |= {"norm": norm, **sizes, **last}
                signature |= dict.fromkeys({**constants, **absent}, "constexpr")
                kernel = groupnorm_silu_fwd_kernel if forward else groupnorm_silu_bwd_kernel
                yield f"{direction} {name}, {rest}", kernel, signature, {**constants, **absent}, warps
