"""Scores of images: JPEG size, the user's own function, and the checks between it and training.

A reward function takes (images [B, 3, H, W] in [0, 1], prompts, metadata), the last two as tuples of length B, and
returns (rewards of length B, metadata).
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import torch
from PIL import Image

from ddpo_fast.plugin import load_function

RewardFunction = Callable[[torch.Tensor, tuple[str, ...], tuple[Any, ...]], tuple[Any, Any]]


def jpeg_incompressibility(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict]:
    """The size of each image as a JPEG of quality 95, in kilobytes (arXiv 2305.13301, section 5.1)."""
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    return torch.tensor([_jpeg_bytes(image) / 1000 for image in pixels]), {}


def jpeg_compressibility(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict]:
    """The negative of `jpeg_incompressibility`."""
    rewards, info = jpeg_incompressibility(images, prompts, metadata)
    return -rewards, info


def _jpeg_bytes(pixels: Any) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return buffer.tell()


REWARDS: dict[str, RewardFunction] = {
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
}


def load_reward(spec: str) -> RewardFunction:
    """A built-in reward by name, or the user's 'module:function'."""
    if spec in REWARDS:
        return REWARDS[spec]
    if ":" not in spec:
        raise ValueError(f"reward is {spec!r}, which is neither 'module:function' nor one of {', '.join(REWARDS)}")
    return load_function("reward", spec)


def score(
    reward_function: RewardFunction, images: torch.Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]
) -> tuple[torch.Tensor, Any]:
    """Calls the reward function on one batch: (fp32 rewards [B], its metadata).

    Raises `RuntimeError` if it raised, `ValueError` if what it returned cannot be trained on.
    """
    try:
        result = reward_function(images, prompts, metadata)
    except Exception as error:
        raise RuntimeError(f"the reward function raised {type(error).__name__}: {error}") from error
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise ValueError(f"the reward function must return (rewards, metadata), got {type(result).__name__}")
    # fp32 also for whole numbers: advantages computed in the rewards' own type would be cut to whole numbers
    rewards = torch.as_tensor(result[0]).detach().to(torch.float32)
    if rewards.shape != (len(prompts),):
        raise ValueError(
            f"the reward function returned rewards of shape {tuple(rewards.shape)} for {len(prompts)} images"
        )
    if not rewards.isfinite().all():
        worst = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(f"the reward function returned {rewards[worst].item()} for prompt {prompts[worst]!r}")
    return rewards, result[1]


_OF_THREAD = threading.local()


def _stream_of_thread(device: torch.device) -> torch.cuda.Stream:
    """One for each worker: the allocator and the libraries keep memory for every stream that was ever used."""
    if not hasattr(_OF_THREAD, "stream"):
        _OF_THREAD.stream = torch.cuda.Stream(device)
    return _OF_THREAD.stream


class Scoring:
    """Scores batches in worker threads while the caller goes on, each call as `score`.

    On a GPU the calls queue their work in a stream of their own, behind what made their images: they do not wait for
    what the caller has queued since.
    """

    def __init__(self, reward_function: RewardFunction, executor: Executor, raises_early: bool = True) -> None:
        self.reward_function = reward_function
        self.executor = executor
        # processes that sample together must not be left in the middle of it
        self.raises_early = raises_early
        # the batches are kept too, as their `id` is theirs only while they live
        self._begun: dict[int, tuple[Sequence[Any], Future[tuple[torch.Tensor, Any]]]] = {}

    def begin(self, batch: Sequence[Any]) -> None:
        """Starts scoring (images, prompts, metadata). Raises what an earlier batch raised, if it is known by now."""
        for _, earlier in self._begun.values():
            if self.raises_early and earlier.done():
                earlier.result()
        images, ready = batch[0], None
        if isinstance(images, torch.Tensor) and images.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self._begun[id(batch)] = batch, self.executor.submit(self._score, ready, *batch[:3])

    def results(self, batches: Sequence[Sequence[Any]]) -> list[tuple[torch.Tensor, Any]]:
        """The scores of batches in order; waits for them, and starts those that were not begun."""
        for batch in batches:
            if id(batch) not in self._begun:
                self.begin(batch)
        futures = [self._begun[id(batch)][1] for batch in batches]
        try:
            return [future.result() for future in futures]
        finally:
            # after an error nobody waits for the rest
            for future in futures:
                future.cancel()

    def _score(self, ready: torch.cuda.Event | None, images: torch.Tensor, *others: Any) -> tuple[torch.Tensor, Any]:
        if ready is None:
            return score(self.reward_function, images, *others)
        stream = _stream_of_thread(images.device)
        stream.wait_event(ready)
        images.record_stream(stream)
        with torch.cuda.stream(stream):
            rewards, metadata = score(self.reward_function, images, *others)
        # this thread has nothing else to do, and whoever reads the rewards is in another stream
        stream.synchronize()
        return rewards, metadata
