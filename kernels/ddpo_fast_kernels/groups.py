"""What the kernels of group norms have in common: the grid, the channels of a program, and the values of a tile."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# two programs for each of the 132 multiprocessors of an H100
FULL_GRID = 264
# elements that a program takes at a time: two 16-byte loads of half precision for each thread of 8 warps
TILE = 4096


def tiling(
    images: int, channels: int, pixels: int, groups: int, itemsize: int, channels_last: bool
) -> tuple[tuple[int, int], dict[str, Any], int]:
    """Returns the grid, the kernels' constants and the number of warps; a program owns whole groups of an image."""
    group_size = channels // groups
    owned = 1
    if channels_last:
        # In channels_last, a group has one short segment of memory for each pixel: 20 bytes for 10 channels of half
        # precision. A program that computes neighbouring groups can read whole 32-byte sectors in 16-byte loads. Groups
        # are joined only as long as enough programs are left to occupy the GPU.
        while groups % (2 * owned) == 0 and images * groups >= 2 * owned * FULL_GRID:
            segment = owned * group_size * itemsize
            if segment >= 64 and segment % 16 == 0:
                break
            owned *= 2
    block_c = triton.next_power_of_2(owned * group_size)
    block_p = min(triton.next_power_of_2(pixels), max(1, TILE // block_c))
    constants = {
        "GROUP_SIZE": group_size,
        "GROUPS": owned,
        "CHANNELS_LAST": channels_last,
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
    }
    return (groups // owned, images), constants, min(8, max(1, block_p * block_c // 512))


@triton.jit
def lanes(
    channels,
    pixels,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Describes the channels of a program, one for each of BLOCK_C lanes.

    Returns which lanes have a channel (BLOCK_C is rounded up to a power of two), the channels, the offsets of their
    first pixels, the step from one pixel to the next, and [GROUPS, BLOCK_C] whether a lane belongs to a group.
    """
    lane = tl.arange(0, BLOCK_C)
    channel = tl.program_id(0) * (GROUPS * GROUP_SIZE) + lane
    # int64: a batch may hold more elements than an int32 counts; an image does not
    image = tl.program_id(1).to(tl.int64) * channels * pixels
    member = (lane // GROUP_SIZE)[None, :] == tl.arange(0, GROUPS)[:, None]
    if CHANNELS_LAST:
        return lane < GROUPS * GROUP_SIZE, channel, image + channel, channels, member
    return lane < GROUPS * GROUP_SIZE, channel, image + channel * pixels, 1, member


@triton.jit
def per_group(member, values):
    # `where` and not a product with 0 or 1: 0 * NaN is NaN, which would spread to the program's other groups
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@triton.jit
def per_channel(member, values):
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def in_parts(ptr, beside_ptr, width, channels, pixels, channel, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Describes images whose channels from `width` on are in a second tensor.

    Returns [1, BLOCK_C] pointers to the channels' first pixels, and the steps from one pixel to the next.
    """
    inside = channel < width
    own = tl.where(inside, width, channels - width)
    at = tl.where(inside, channel, channel - width)
    image = tl.program_id(1).to(tl.int64) * own * pixels
    if CHANNELS_LAST:
        offset = image + at
        step = own
    else:
        offset = image + at * pixels
        step = tl.full([BLOCK_C], 1, tl.int32)
    return tl.where(inside, ptr + offset, beside_ptr + offset)[None, :], step[None, :]


@triton.jit
def addend_of(addend_ptr, addend_step, channel, real):
    """What is added to each channel of the program's image, [1, BLOCK_C], or 0 without an addend."""
    if addend_ptr is None:
        return 0.0
    else:  # noqa: RET505  # Triton compiles what follows a `return` that is taken
        at = tl.program_id(1) * addend_step + channel
        return tl.load(addend_ptr + at, mask=real, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_sum(x_ptr, residual_ptr, addend, offset, mask):
    """x + addend or, as it is stored, x + addend + residual."""
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) + addend
    if residual_ptr is not None:
        x += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        # the backward pass reads the rounded sum
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def normalised(x_ptr, addend, grad_ptr, offset, mask, mean, rstd, weight, bias, SILU: tl.constexpr):
    """Returns xhat = (x - mean) * rstd and the gradient with respect to z = xhat * weight + bias, SiLU's input."""
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) + addend
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    xhat = (x - mean[None, :]) * rstd[None, :]
    if SILU:
        z = xhat * weight[None, :] + bias[None, :]
        sigmoid = tl.sigmoid(z)
        # the derivative of z sigmoid(z). z is computed again from x, so that the forward pass need not save it.
        grad *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    return xhat, grad
