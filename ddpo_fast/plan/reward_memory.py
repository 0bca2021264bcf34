"""The memory of a run's rewards, as far as they tell it: those with a CLIP do, and a user's may.

A reward tells the bytes of its weights by a method `memory_bytes(dtype)`. Where it computes and in which type is in its
`network`, and what a batch of images takes is traced if it has a `clip`.

Shapes: B images of a sampling batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddpo_fast.device_memory import CUDA_CONTEXT
from ddpo_fast.plan.live_bytes import trace
from ddpo_fast.rewards import SeveralRewards
from ddpo_fast.rewards.network import default_dtype

# Bytes of a reward's own process in host memory, with torch and transformers but without weights: assumed, as measured
# with torch for CPUs.
PROCESS = 600_000_000
# A batch exists that often while its pixels are converted: the reward's own copy, in 255 steps, and rounded.
COPIES = 3


@dataclass(frozen=True)
class RewardMemory:
    """Bytes that rewards take.

    Args:
        resident: on the GPU, all the time.
        offloaded: on the GPU, while images are scored, of weights that are in host memory between calls.
        activations: on the GPU, while images are scored.
        processes: on the GPU, all the time, by the rewards' own processes.
        host: in host memory, all the time.
    """

    resident: int = 0
    offloaded: int = 0
    activations: int = 0
    processes: int = 0
    host: int = 0


def reward_memory(
    functions: Sequence[Any], images: int, size: tuple[int, int], device_type: str, own_process: bool
) -> RewardMemory:
    """The memory of reward functions, of which those of one `SeveralRewards` may compute at the same time.

    Args:
        functions: those that are trained on, and those of evaluations, which compute at other times. They are as
            `rewards.load` makes them without `own_process`.
        images: B.
        size: height and width of an image.
        device_type: of the run, whose device the images are on.
        own_process: whether each of the rewards has a process of its own.

    Raises what reading the rewards' config files raises; no weights are loaded.
    """
    memory: dict[int, RewardMemory] = {}
    at_once = [0]
    for function in functions:
        parts = list(function.parts.values()) if isinstance(function, SeveralRewards) else [function]
        found = {id(part): _memory_of(part, images, size, device_type) for part in parts}
        at_once.append(sum(part.activations for part in found.values()))
        memory |= found
    each = list(memory.values())
    resident, offloaded, host = (sum(getattr(m, name) for m in each) for name in ("resident", "offloaded", "host"))
    if not own_process:
        return RewardMemory(resident, offloaded, max(at_once), host=host + offloaded)
    host += offloaded + PROCESS * len(each)
    if device_type != "cuda":
        return RewardMemory(resident, offloaded, max(at_once), host=host)
    # A process keeps what it has had, as its allocator returns nothing. Its images come by the run's GPU, on which each
    # process then has a context.
    kept = sum(m.activations + CUDA_CONTEXT for m in each)
    return RewardMemory(processes=resident + offloaded + kept, host=host)


def _memory_of(reward: Any, images: int, size: tuple[int, int], device_type: str) -> RewardMemory:
    copies = COPIES * images * 3 * math.prod(size) * torch.float32.itemsize
    if not hasattr(reward, "memory_bytes"):
        return RewardMemory(activations=copies)
    # a reward function of the user's may tell its bytes, and have no `Network`
    network = getattr(reward, "network", None)
    device = getattr(network, "device", None) or torch.device(device_type)
    dtype = getattr(network, "dtype", None) or default_dtype(device)
    if device.type != device_type or device.index:
        return RewardMemory(activations=copies, host=reward.memory_bytes(dtype) if device.type == "cpu" else 0)
    weights, computing = reward.memory_bytes(dtype), copies
    if clip := getattr(reward, "clip", None):
        computing += trace(clip.on_meta(dtype, size), device_type).peak(min(images, clip.batch_size))
    if getattr(network, "offload", False):
        return RewardMemory(offloaded=weights, activations=computing)
    return RewardMemory(resident=weights, activations=computing)
