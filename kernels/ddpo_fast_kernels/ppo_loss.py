"""The clipped PPO loss and its gradient in one launch; `ddpo_fast/ops/ppo_loss.py` derives the gradient.

One program computes a pair. Its first pass over the elements computes the log-prob, which gives the ratio and the
factor of the gradient; its second pass writes the gradient. The last program to finish averages over the pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ddpo_fast_kernels.gaussian import coefficients, load_fp32, load_guided, log_density, mean, place, store_guided
from ddpo_fast_kernels.launch import block_and_warps, is_last, row_layout, tickets


class Pairs(NamedTuple):
    """The data of N pairs: latents [N, ...], the others [N]; and the table of coefficients [K, 4]."""

    latents: Any
    next_latents: Any
    old_log_probs: Any
    advantages: Any
    table: Any
    timesteps: Any


class Bounds(NamedTuple):
    """The ratio's bounds, the clip range, the bound of advantages, and the weight of the KL to the reference model."""

    low: Any
    high: Any
    clip_range: Any
    advantage_limit: Any
    reference_weight: Any


class Results(NamedTuple):
    """loss [], metrics [4], log_probs [N], the output's gradient, and scratch [5, N] for terms to be averaged."""

    loss: Any
    metrics: Any
    log_probs: Any
    grad: Any
    scratch: Any


@triton.jit
def ppo_loss_fwd_kernel(
    output,
    reference,
    pairs,
    bounds,
    results,
    ticket,
    grad_scale,
    guidance,
    D,
    GUIDED: tl.constexpr,
    REFERENCE: tl.constexpr,
    SCALED: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # int64: pair * D may exceed what an int32 counts
    pair = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0)
    c_x, c_m, sigma, credit = coefficients(pairs.table, pairs.timesteps, pair, True)
    # Each lane adds up every BLOCK-th element, and at the end the lanes are added, in the same order as in
    # `step_logprob`.
    squares = tl.zeros([BLOCK], tl.float32)
    apart_squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        mask = d < D
        at = place(d, CHANNELS, PIXELS)
        guided = load_guided(output, pair, count, D, at, mask, guidance, GUIDED)
        mu = mean(guided, load_fp32(pairs.latents, pair, D, d, mask), c_x, c_m)
        difference = tl.where(mask, load_fp32(pairs.next_latents, pair, D, d, mask) - mu, 0.0)
        squares = tl.fma(difference, difference, squares)
        if REFERENCE:
            apart = c_m * (guided - load_guided(reference, pair, count, D, at, mask, guidance, GUIDED))
            apart_squares = tl.fma(apart, apart, apart_squares)
    log_prob = log_density(tl.sum(squares, axis=0), D, sigma)
    # the KL's share of a step of this credit
    credit_squared = credit * credit
    reference_kl = tl.sum(apart_squares, axis=0) / D / (2.0 * sigma * sigma) * credit_squared
    slope = settle_pair(pair, count, log_prob, reference_kl, credit, pairs, bounds, results)
    # both terms of the gradient have this factor: d mean / d guided = c_m, 1 / sigma^2, and the means over D and pairs
    share = c_m / (sigma * sigma) / (D * count.to(tl.float32))
    if SCALED:
        share *= tl.load(grad_scale)
    slope *= share
    reference_slope = share * credit_squared * bounds.reference_weight
    # The second pass loads everything again, because a whole image does not fit in registers. The data is still cached.
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        mask = d < D
        at = place(d, CHANNELS, PIXELS)
        guided = load_guided(output, pair, count, D, at, mask, guidance, GUIDED)
        mu = mean(guided, load_fp32(pairs.latents, pair, D, d, mask), c_x, c_m)
        grad = slope * (load_fp32(pairs.next_latents, pair, D, d, mask) - mu)
        if REFERENCE:
            other = load_guided(reference, pair, count, D, at, mask, guidance, GUIDED)
            grad = tl.fma(reference_slope * c_m, guided - other, grad)
        store_guided(results.grad, pair, count, D, at, mask, grad, guidance, GUIDED)
    if is_last(ticket, count):
        average(results, count)


@triton.jit
def settle_pair(pair, count, log_prob, reference_kl, credit, pairs, bounds, results):
    """Stores a pair's log-prob and its terms of the averages; returns d term / d log_prob."""
    advantage = tl.load(pairs.advantages + pair)
    # tl.minimum and tl.maximum drop a NaN by default, but a NaN advantage or ratio must reach the loss
    advantage = tl.minimum(advantage, bounds.advantage_limit, propagate_nan=tl.PropagateNan.ALL)
    advantage = tl.maximum(advantage, -bounds.advantage_limit, propagate_nan=tl.PropagateNan.ALL)
    change = log_prob - tl.load(pairs.old_log_probs + pair)
    ratio = tl.exp(credit * change)
    moved = tl.abs(ratio - 1.0)
    clipped = tl.minimum(ratio, bounds.high, propagate_nan=tl.PropagateNan.ALL)
    clipped = tl.maximum(clipped, bounds.low, propagate_nan=tl.PropagateNan.ALL)
    term = tl.maximum(-advantage * ratio, -advantage * clipped, propagate_nan=tl.PropagateNan.ALL)
    beyond = ((advantage > 0.0) & (ratio > bounds.high)) | ((advantage < 0.0) & (ratio < bounds.low))
    tl.store(results.log_probs + pair, log_prob)
    tl.store(results.scratch + pair, tl.fma(bounds.reference_weight, reference_kl, term))
    tl.store(results.scratch + count + pair, 0.5 * change * change)
    tl.store(results.scratch + 2 * count + pair, tl.where(moved > bounds.clip_range, 1.0, 0.0))
    tl.store(results.scratch + 3 * count + pair, moved)
    tl.store(results.scratch + 4 * count + pair, reference_kl)
    return tl.where(beyond, 0.0, -advantage * ratio * credit)


@triton.jit
def average(results, count):
    """Stores the means over the pairs, added in a fixed order, and the largest |ratio - 1|.

    Atomic additions by every program would be simpler, but their order, and so the last bits of the loss, would differ
    between launches.
    """
    tl.store(results.loss, column_sum(results.scratch, count) / count)
    tl.store(results.metrics, column_sum(results.scratch + count, count) / count)
    tl.store(results.metrics + 1, column_sum(results.scratch + 2 * count, count) / count)
    moved = results.scratch + 3 * count
    largest = tl.zeros([1024], tl.float32)
    for start in range(0, count, 1024):
        i = start + tl.arange(0, 1024)
        largest = tl.maximum(largest, tl.load(moved + i, mask=i < count, other=0.0, volatile=True))
    total = column_sum(moved, count)
    # tl.max ignores a NaN, but the sum is NaN if any term is
    tl.store(results.metrics + 2, tl.where(total != total, total, tl.max(largest, axis=0)))
    tl.store(results.metrics + 3, column_sum(results.scratch + 4 * count, count) / count)


@triton.jit
def column_sum(column, count):
    """The sum of `count` values, in an order that depends on `count` only."""
    sums = tl.zeros([1024], tl.float32)
    for start in range(0, count, 1024):
        i = start + tl.arange(0, 1024)
        # volatile: other programs wrote these during the launch, so a cached or reordered read could be stale
        sums += tl.load(column + i, mask=i < count, other=0.0, volatile=True)
    return tl.sum(sums, axis=0)


def ppo_loss(
    model_output: torch.Tensor,
    reference_output: torch.Tensor | None,
    latents: torch.Tensor,
    next_latents: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    table: torch.Tensor,
    timesteps: torch.Tensor,
    grad_scale: torch.Tensor | None,
    guidance_scale: float | None,
    clip_range: float,
    advantage_limit: float,
    reference_weight: float,
    loss: torch.Tensor,
    metrics: torch.Tensor,
    log_probs: torch.Tensor,
    grad: torch.Tensor,
) -> None:
    """Fills `loss` [], `metrics` [4], `log_probs` [N] and `grad`, which is laid out as `model_output`; N > 0."""
    elements = latents[0].numel()
    block, warps = block_and_warps(elements)
    channels, pixels = row_layout(model_output)
    scratch = torch.empty(5, len(latents), dtype=torch.float32, device=latents.device)
    with torch.cuda.device_of(latents):
        ppo_loss_fwd_kernel[(len(latents),)](
            model_output,
            model_output if reference_output is None else reference_output,
            Pairs(latents, next_latents, old_log_probs, advantages, table, timesteps),
            Bounds(1.0 - clip_range, 1.0 + clip_range, clip_range, advantage_limit, reference_weight),
            Results(loss, metrics, log_probs, grad, scratch),
            tickets(latents.device),
            loss if grad_scale is None else grad_scale,
            1.0 if guidance_scale is None else guidance_scale,
            elements,
            GUIDED=guidance_scale is not None,
            REFERENCE=reference_output is not None,
            SCALED=grad_scale is not None,
            CHANNELS=channels,
            PIXELS=pixels,
            BLOCK=block,
            num_warps=warps,
        )


def ahead_of_time() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any], int]]:
    """Yields (name, kernel, signature, constants, warps) of the launches for Stable Diffusion's latents.

    `bench/compile_kernels.py` compiles them for GPUs that need not be there.
    """
    block, warps = block_and_warps(4 * 64 * 64)
    for dtype in ("fp16", "bf16", "fp32"):
        for guided, reference, channels in ((True, False, 0), (True, False, 4), (True, True, 4), (False, False, 0)):
            constants = {
                "GUIDED": guided,
                "REFERENCE": reference,
                "SCALED": dtype == "fp16",
                "CHANNELS": channels,
                "PIXELS": 4096 if channels else 0,
                "BLOCK": block,
            }
            signature = {
                "output": f"*{dtype}",
                "reference": f"*{dtype}",
                "pairs": Pairs("*fp32", "*fp32", "*fp32", "*fp32", "*fp32", "*i64"),
                "bounds": Bounds(*["fp32"] * 5),
                "results": Results("*fp32", "*fp32", "*fp32", f"*{dtype}", "*fp32"),
                "ticket": "*i32",
                "grad_scale": "*fp32",
                "guidance": "fp32",
                "D": "i32",
                **dict.fromkeys(constants, "constexpr"),
            }
            kind = f"{'guided' if guided else 'plain'}{' reference' if reference else ''}"
            name = f"fwd {dtype} {kind} {'channels_last' if channels else 'contiguous'}"
            yield name, ppo_loss_fwd_kernel, signature, constants, warps
