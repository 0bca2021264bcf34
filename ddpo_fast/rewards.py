"""Scores of images: JPEG size, the user's own function, and the checks between it and training.

A reward function takes (images [B, 3, H, W] in fp32 in [0, 1], prompts, metadata), the last two as tuples of length B,
and returns (rewards of length B, metadata).
"""

from __future__ import annotations

import io
import numbers
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddpo_fast.interruption import Signalled
from ddpo_fast.user_functions import describe_value, error_line, function_name, load_function, where_raised

# the names of worker threads begin so
WORKER_NAME = "reward"

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
    # its own copy: what it changes in place is not what hooks and pictures are to show
    own = images.clone() if isinstance(images, torch.Tensor) else images
    try:
        result = reward_function(own, prompts, metadata)
    except Signalled:
        raise
    # one that exits would end the run without a word
    except (Exception, SystemExit) as error:
        problem = f"the reward function raised {error_line(error)} ({where_raised(error, reward_function)})"
        if threading.current_thread().name.startswith(WORKER_NAME):
            problem += "; it ran in a worker thread: set async_reward_computation=False if it needs the main one"
        # a notebook has a loop of its own
        elif "running event loop" in str(error) or "loop is already running" in str(error):
            problem += "; set async_reward_computation=True: worker threads have no event loop yet"
        raise RuntimeError(problem) from error
    name = function_name(reward_function)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise ValueError(f"the reward function must return (rewards, metadata), got {describe_value(result)} ({name})")
    rewards = _as_fp32(result[0], len(prompts), name)
    if not rewards.isfinite().all():
        worst = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(
            f"the reward function returned {rewards[worst].item()} for prompt {prompts[worst]!r} ({name}): every image "
            "needs a finite number"
        )
    return rewards, result[1]


def _as_fp32(given: Any, count: int, name: str) -> torch.Tensor:
    """What a reward function returned as rewards, as a plain tensor [B].

    In fp32 also for whole numbers: advantages computed in the rewards' own type would be cut to whole numbers. [B, 1]
    is what a reward model's last layer gives, and TRL takes it.
    """
    needs = f"return {count} real numbers, one for each image, as a tensor, an array or a list"
    try:
        rewards = _real_numbers(given)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(
            f"the reward function returned {describe_value(given)} as rewards ({name}): {needs}"
        ) from error
    if rewards.shape[:1] != (count,) or rewards.numel() != count:
        shape = tuple(rewards.shape)
        raise ValueError(f"the reward function returned rewards of shape {shape} for {count} images ({name}): {needs}")
    return rewards.reshape(count)


def _real_numbers(given: Any) -> torch.Tensor:
    """Numbers in a tensor, an array or a list, in fp32. Raises one of several errors for anything else."""
    if isinstance(given, torch.Tensor):
        if given.is_complex():
            raise TypeError("complex numbers")
        return given.detach().as_subclass(torch.Tensor).to(torch.float32)
    if isinstance(given, (list, tuple)):
        given = [_real_numbers(item).cpu().numpy() if isinstance(item, torch.Tensor) else item for item in given]
    elif isinstance(given, np.ma.MaskedArray):
        given = np.ma.filled(given.astype(np.float64), np.nan)
    elif not hasattr(given, "__array__"):
        raise TypeError("neither a tensor nor an array nor a list")
    array = np.asarray(given)
    if array.dtype == object and all(isinstance(item, (numbers.Real, Decimal)) for item in array.flat):
        array = array.astype(np.float64)
    if array.dtype.kind not in "biuf":
        raise TypeError("not real numbers")
    with np.errstate(over="ignore"):
        return torch.from_numpy(array.astype(np.float32))


_OF_THREAD = threading.local()


def _stream_of_thread(device: torch.device) -> torch.cuda.Stream:
    """One for each worker: the allocator and the libraries keep memory for every stream that was ever used."""
    if not hasattr(_OF_THREAD, "stream"):
        _OF_THREAD.stream = torch.cuda.Stream(device)
    return _OF_THREAD.stream


class _ThisThread(Executor):
    """Runs what is submitted where it is submitted; its future keeps what it raised."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Scoring:
    """Scores batches in worker threads while the caller goes on, each call as `score`.

    On a GPU the calls queue their work in a stream of their own, behind what made their images: they do not wait for
    what the caller has queued since.

    Args:
        executor: the worker threads; None to score in the caller's own, at once.
    """

    def __init__(self, reward_function: RewardFunction, executor: Executor | None, raises_early: bool = True) -> None:
        self.reward_function = reward_function
        self.executor = executor or _ThisThread()
        # processes that sample together must not be left in the middle of it
        self.raises_early = raises_early
        # the batches are kept too, as their `id` is theirs only while they live
        self._begun: dict[int, tuple[Sequence[Any], Future[tuple[torch.Tensor, Any]]]] = {}

    def begin(self, batch: Sequence[Any], ready: torch.cuda.Event | None = None) -> None:
        """Starts scoring (images, prompts, metadata). Raises what a batch raised, if it is known by now.

        On a GPU `ready` is the event that the images are behind (default: what this thread has queued so far).
        """
        images = batch[0]
        if ready is None and isinstance(images, torch.Tensor) and images.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self._begun[id(batch)] = batch, self.executor.submit(self._score, ready, *batch[:3])
        for _, begun in self._begun.values():
            if self.raises_early and begun.done():
                begun.result()

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
