"""Every op at Stable Diffusion 1.5's sizes, with the plain PyTorch that it replaces and the bytes that it must move."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpo_fast.ops import clipped_surrogate, guided, ppo_loss, score_step, step_logprob, take_step
from ddpo_fast.ops.add_layernorm import add_layernorm
from ddpo_fast.ops.backend import OPS, Op
from ddpo_fast.ops.frozen import frozen_conv2d
from ddpo_fast.ops.gaussian import table_rows
from ddpo_fast.ops.geglu import geglu
from ddpo_fast.ops.groupnorm_silu import csrc_declines, groupnorm_silu
from ddpo_fast.ops.lora_linear import lora_linear
from ddpo_fast.ops.qkv_linear import qkv_linear

Function = Callable[..., Any]
HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
GUIDANCE, GROUPS, EPS, SCALING = 5.0, 32, 1e-5, 1.0


@dataclass
class Case:
    """An op at a size, with two functions of the same arguments: `eager` in plain PyTorch, and `fused`.

    `leaves` are the arguments that get a gradient. `moved` has the least bytes that an implementation must read and
    write in each direction that is timed: 'fwd', 'bwd', 'fwd+bwd'. `others` are other packages' implementations.
    `declines(direction)` is whether the backend `csrc` leaves the call to another one.
    """

    op: Op
    shape: str
    dtype: torch.dtype
    eager: Function
    fused: Function
    arguments: tuple[Any, ...]
    leaves: tuple[Tensor, ...]
    moved: dict[str, int]
    others: dict[str, Function] = field(default_factory=dict)
    declines: Callable[[str], bool] = lambda direction: False


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def normal(*shape: int, dtype: torch.dtype, device: str, channels_last: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(shape, generator=generator).to(device, dtype)
    return made.contiguous(memory_format=torch.channels_last) if channels_last else made


def size_of(device: str, size: str) -> str:
    return "tiny" if size == "tiny" else device


# images, edge of a latent, dtype of the UNet's output, whether it is channels_last
STEP_SIZES = {
    "tiny": [(2, 8, FULL, False)],
    "cpu": [(12, 64, FULL, False), (12, 64, BF16, False), (12, 64, BF16, True)],
    "cuda": [(24, 64, HALF, True), (24, 64, HALF, False), (24, 64, FULL, False), (6, 64, HALF, True)],
}


def _step_inputs(device: str, size: str) -> Iterator[tuple[str, torch.dtype, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    for images, edge, dtype, channels_last in STEP_SIZES[size_of(device, size)]:
        shape = (images, 4, edge, edge)
        output = normal(2 * images, *shape[1:], dtype=dtype, device=device, channels_last=channels_last)
        latents = normal(*shape, dtype=FULL, device=device)
        noise = latents.flip(0)
        table = torch.tensor([[1.0, -0.05, 0.05, 1.0]], device=device).expand(50, 4).contiguous()
        timesteps = torch.arange(images, device=device)
        name = f"{images} x 4 x {edge} x {edge} {'channels_last' if channels_last else 'contiguous'}"
        yield name, dtype, output.requires_grad_(), latents, noise, table, timesteps


def step_logprob_cases(device: str, size: str) -> Iterator[Case]:
    def eager(output: Tensor, latents: Tensor, noise: Tensor, table: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
        combined = guided(output, GUIDANCE)
        rows = table_rows(table, timesteps, latents)[:3]
        following = take_step(combined, latents, noise, *rows)
        log_probs = score_step(combined, latents, following, *rows)
        return following, log_probs, torch.cat([following] * 2).to(output.dtype)

    def fused(*arguments: Any) -> tuple[Tensor, ...]:
        return step_logprob(*arguments, GUIDANCE)

    for name, dtype, output, latents, noise, table, timesteps in _step_inputs(device, size):
        latents.requires_grad_()
        step = nbytes(output, latents, timesteps)
        moved = {"fwd": 2 * step + nbytes(noise), "bwd": 3 * step + nbytes(latents)}
        arguments = (output, latents, noise, table, timesteps)
        yield Case(OPS["step_logprob"], name, dtype, eager, fused, arguments, (output, latents), moved)


def ppo_loss_cases(device: str, size: str) -> Iterator[Case]:
    clip_range, limit = 1e-4, 5.0

    def eager(
        output: Tensor, latents: Tensor, following: Tensor, old: Tensor, advantages: Tensor, table: Tensor, t: Tensor
    ) -> Tensor:
        log_probs = score_step(guided(output, GUIDANCE), latents, following, *table_rows(table, t, latents)[:3])
        ratio = torch.exp(log_probs - old)
        with torch.no_grad():
            moved = (ratio - 1).abs()
            _ = 0.5 * (log_probs - old).square().mean(), (moved > clip_range).float().mean(), moved.max()
        return clipped_surrogate(advantages.clamp(-limit, limit), clip_range, ratio)

    def fused(*arguments: Any) -> Tensor:
        return ppo_loss(*arguments, GUIDANCE, clip_range=clip_range, advantage_limit=limit).loss

    for name, dtype, output, latents, noise, table, timesteps in _step_inputs(device, size):
        with torch.no_grad():
            rows = table_rows(table, timesteps, latents)[:3]
            combined = guided(output, GUIDANCE)
            following = take_step(combined, latents, noise, *rows)
            old = score_step(combined, latents, following, *rows)
        arguments = (output, latents, following, old, torch.ones_like(old), table, timesteps)
        # the op computes the gradient in the pass that computes the loss, so the directions are not timed apart
        moved = {"fwd+bwd": 2 * nbytes(output) + nbytes(latents, following, old, old, old, timesteps)}
        yield Case(OPS["ppo_loss"], name, dtype, eager, fused, arguments, (output,), moved)


# images, channels, edge, dtype: on a GPU the five largest shapes of the UNet
GROUPNORM_SIZES = {
    "tiny": [(2, 64, 8, FULL)],
    "cpu": [(2, 320, 64, FULL), (2, 640, 32, FULL), (2, 320, 64, BF16), (2, 640, 32, BF16)],
    "cuda": [(24, c, edge, HALF) for edge, c in ((64, 960), (64, 640), (64, 320), (32, 1920), (32, 1280))],
}


def groupnorm_silu_cases(device: str, size: str) -> Iterator[Case]:
    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return groupnorm_silu(x, weight, bias, GROUPS, EPS)

    for images, channels, edge, dtype in GROUPNORM_SIZES[size_of(device, size)]:
        x = normal(images, channels, edge, edge, dtype=dtype, device=device, channels_last=True).requires_grad_()
        weight = torch.ones(channels, dtype=dtype, device=device, requires_grad=True)
        bias = torch.zeros_like(weight, requires_grad=True)
        name = f"{images} x {channels} x {edge} x {edge} channels_last"
        moved = each_direction(2 * nbytes(x) + nbytes(weight, bias), 3 * nbytes(x) + nbytes(weight, weight, bias))
        leaves = (x, weight, bias)
        others = _liger_groupnorm(device)

        def declines(direction: str, x: Tensor = x) -> bool:
            return csrc_declines(x, GROUPS, direction != "fwd", has_sum=False)

        yield Case(OPS["groupnorm_silu"], name, dtype, eager, fused, leaves, leaves, moved, others, declines)


# rows, width of the projection (values and gates), dtype
GEGLU_SIZES = {
    "tiny": [(64, 64, FULL)],
    "cpu": [(2048, 2560, FULL), (2048, 2560, BF16)],
    "cuda": [(4096 * 24, 2560, HALF), (1024 * 24, 5120, HALF)],
}


def geglu_cases(device: str, size: str) -> Iterator[Case]:
    def eager(x: Tensor, bias: Tensor | None = None) -> Tensor:
        values, gates = (x if bias is None else x + bias).chunk(2, -1)
        return values * F.gelu(gates)

    for rows, width, dtype in GEGLU_SIZES[size_of(device, size)]:
        x = normal(rows, width, dtype=dtype, device=device).requires_grad_()
        moved = {"fwd": nbytes(x) * 3 // 2, "bwd": nbytes(x) * 5 // 2}
        others = _liger_geglu(device)
        yield Case(OPS["geglu"], f"{rows} x {width}", dtype, eager, geglu, (x,), (x,), moved, others)
        bias = torch.zeros(width, dtype=dtype, device=device).requires_grad_()
        name = f"{rows} x {width}, bias"
        yield Case(OPS["geglu"], name, dtype, eager, geglu, (x, bias), (x, bias), moved)


# rows, channels, dtype
LAYERNORM_SIZES = {
    "tiny": [(64, 32, FULL)],
    "cpu": [(2048, 320, FULL), (2048, 320, BF16)],
    "cuda": [(4096 * 24, 320, HALF), (1024 * 24, 640, HALF), (256 * 24, 1280, HALF)],
}


def add_layernorm_cases(device: str, size: str) -> Iterator[Case]:
    """The sum has a residual and a bias; both results are used."""

    def eager(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, added: Tensor) -> Tensor:
        s = residual + (x + added)
        return s + F.layer_norm(s, x.shape[-1:], scale, shift, EPS)

    def fused(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, added: Tensor) -> Tensor:
        s, y = add_layernorm(x, scale, shift, EPS, residual, added)
        return s + y

    for rows, channels, dtype in LAYERNORM_SIZES[size_of(device, size)]:
        x, residual = (normal(rows, channels, dtype=dtype, device=device).requires_grad_() for _ in range(2))
        vectors = [normal(channels, dtype=dtype, device=device).requires_grad_() for _ in range(3)]
        leaves = (x, *vectors[:2], residual, vectors[2])
        moved = {"fwd+bwd": 11 * nbytes(x)}
        yield Case(OPS["add_layernorm"], f"{rows} x {channels}", dtype, eager, fused, leaves, leaves, moved)


def qkv_linear_cases(device: str, size: str) -> Iterator[Case]:
    def eager(x: Tensor, *weights: Tensor) -> Tensor:
        q, k, v = (F.linear(x, weight) for weight in weights)
        return q + k + v

    def fused(x: Tensor, *weights: Tensor) -> Tensor:
        q, k, v = qkv_linear(x, weights)
        return q + k + v

    for rows, channels, dtype in LAYERNORM_SIZES[size_of(device, size)]:
        x = normal(rows, channels, dtype=dtype, device=device).requires_grad_()
        weights = tuple(normal(channels, channels, dtype=dtype, device=device).requires_grad_() for _ in range(3))
        leaves = (x, *weights)
        moved = {"fwd+bwd": 3 * nbytes(*weights) + 14 * nbytes(x)}
        yield Case(OPS["qkv_linear"], f"{rows} x {channels}", dtype, eager, fused, leaves, leaves, moved)


# rows, channels, rank, dtype
LORA_SIZES = {
    "tiny": [(64, 32, 4, FULL)],
    "cpu": [(2048, 320, 4, FULL), (2048, 320, 4, BF16)],
    "cuda": [(4096 * 24, 320, 4, HALF)],
}


def lora_linear_cases(device: str, size: str) -> Iterator[Case]:
    def eager(x: Tensor, weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        low = F.linear(x, lora_a.to(x.dtype))
        return F.linear(x, weight, bias) + F.linear(low, lora_b.to(x.dtype)) * SCALING

    def fused(*arguments: Any) -> Tensor:
        return lora_linear(*arguments, SCALING)

    for rows, channels, rank, dtype in LORA_SIZES[size_of(device, size)]:
        x = normal(rows, channels, dtype=dtype, device=device).requires_grad_()
        weight = normal(channels, channels, dtype=dtype, device=device)
        bias = torch.zeros(channels, dtype=dtype, device=device)
        # adapters are fp32 whatever the network computes in
        lora_a = normal(rank, channels, dtype=FULL, device=device).requires_grad_()
        lora_b = normal(channels, rank, dtype=FULL, device=device).requires_grad_()
        operands = nbytes(x, weight, lora_a, lora_b)
        moved = {"fwd+bwd": operands + nbytes(bias, x) + operands + nbytes(x, x, lora_a, lora_b)}
        arguments = (x, weight, bias, lora_a, lora_b)
        name = f"{rows} x {channels}, rank {rank}"
        yield Case(OPS["lora_linear"], name, dtype, eager, fused, arguments, (x, lora_a, lora_b), moved)


# images, channels, edge, dtype
CONV_SIZES = {
    "tiny": [(2, 8, 8, FULL)],
    "cpu": [(2, 320, 32, FULL)],
    "cuda": [(24, 320, 64, HALF), (24, 640, 32, HALF)],
}


def frozen_cases(device: str, size: str) -> Iterator[Case]:
    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return frozen_conv2d(x, weight, bias, padding=(1, 1))

    for images, channels, edge, dtype in CONV_SIZES[size_of(device, size)]:
        x = normal(images, channels, edge, edge, dtype=dtype, device=device, channels_last=True).requires_grad_()
        weight = normal(channels, channels, 3, 3, dtype=dtype, device=device, channels_last=True)
        bias = torch.zeros(channels, dtype=dtype, device=device)
        name = f"{images} x {channels} x {edge} x {edge}, 3 x 3 channels_last"
        moved = {"fwd+bwd": 4 * nbytes(x) + nbytes(weight, weight, bias)}
        yield Case(OPS["frozen_conv2d"], name, dtype, eager, fused, (x, weight, bias), (x,), moved)


CASES: dict[str, Callable[[str, str], Iterator[Case]]] = {
    "step_logprob": step_logprob_cases,
    "ppo_loss": ppo_loss_cases,
    "groupnorm_silu": groupnorm_silu_cases,
    "geglu": geglu_cases,
    "add_layernorm": add_layernorm_cases,
    "qkv_linear": qkv_linear_cases,
    "lora_linear": lora_linear_cases,
    "frozen": frozen_cases,
}


def each_direction(forward: int, backward: int) -> dict[str, int]:
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}


def _liger_groupnorm(device: str) -> dict[str, Function]:
    if device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(LigerGroupNormFunction.apply(x.contiguous(), weight, bias, x.shape[1], GROUPS, EPS))

    return {"liger": liger}


def _liger_geglu(device: str) -> dict[str, Function]:
    if device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    # Liger's is GELU's tanh approximation; Stable Diffusion was trained with the exact function
    return {"liger": lambda x: LigerGELUMulFunction.apply(*x.chunk(2, -1)[::-1])}
