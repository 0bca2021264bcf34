"""Checked calls of a reward function, and scoring in worker threads while the next images are sampled."""

from __future__ import annotations

import logging
import numbers
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from decimal import Decimal
from typing import Any

import numpy as np
import torch

from ddpo_fast.interruption import Signalled
from ddpo_fast.user_functions import describe_value, error_line, function_name, where_raised

logger = logging.getLogger(__name__)

# the names of the worker threads of rewards begin with this
WORKER_NAME = "reward"

RewardFunction = Callable[[torch.Tensor, tuple[str, ...], tuple[Any, ...]], tuple[Any, Any]]


class PartFailed(RuntimeError):
    """One of several rewards failed; the message names it and says what happened."""


def score(
    reward_function: RewardFunction,
    images: torch.Tensor,
    prompts: tuple[str, ...],
    metadata: tuple[Any, ...],
    called: str = "the reward function",
) -> tuple[torch.Tensor, Any]:
    """Calls the reward function with one batch and returns its rewards, in fp32 [B], and its metadata.

    Args:
        called: what messages call the function.

    Raises `RuntimeError` if the function raises, `ValueError` if what it returns cannot be trained on.
    """
    # The function may change its images in place, and hooks and pictures need the originals: it gets a copy.
    own = images.clone() if isinstance(images, torch.Tensor) else images
    try:
        result = reward_function(own, prompts, metadata)
    except (Signalled, PartFailed):
        raise
    # SystemExit too: a function that calls `sys.exit` would end the run without a message
    except (Exception, SystemExit) as error:
        problem = f"{called} raised {error_line(error)} ({where_raised(error, reward_function)})"
        if threading.current_thread().name.startswith(WORKER_NAME):
            problem += "; it ran in a worker thread: set async_reward_computation=False if it needs the main one"
        # a notebook runs an event loop in its main thread, where `asyncio.run` then fails
        elif "running event loop" in str(error) or "loop is already running" in str(error):
            problem += "; set async_reward_computation=True: worker threads have no event loop yet"
        raise RuntimeError(problem) from error
    name = function_name(reward_function)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise ValueError(f"{called} must return (rewards, metadata), got {describe_value(result)} ({name})")
    rewards = _as_fp32(result[0], len(prompts), called, name)
    if not rewards.isfinite().all():
        worst = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(
            f"{called} returned {rewards[worst].item()} for prompt {prompts[worst]!r} ({name}): every image "
            "needs a finite number"
        )
    return rewards, result[1]


def _as_fp32(given: Any, count: int, called: str, name: str) -> torch.Tensor:
    """The rewards that a function returned, as a tensor [B] in fp32.

    Whole numbers are converted too, as advantages in an integer type would be rounded to whole numbers. [B, 1], the
    output of a reward model's last layer, is accepted, as by TRL.
    """
    needs = f"return {count} real numbers, one for each image, as a tensor, an array or a list"
    try:
        rewards = _real_numbers(given)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{called} returned {describe_value(given)} as rewards ({name}): {needs}") from error
    if rewards.shape[:1] != (count,) or rewards.numel() != count:
        shape = tuple(rewards.shape)
        raise ValueError(f"{called} returned rewards of shape {shape} for {count} images ({name}): {needs}")
    return rewards.reshape(count)


def _real_numbers(given: Any) -> torch.Tensor:
    """The numbers of a tensor, an array or a list as a tensor in fp32.

    Raises `TypeError`, or what NumPy and torch raise, for anything else.
    """
    if isinstance(given, torch.Tensor):
        if given.is_complex():
            raise TypeError("complex numbers")
        return given.detach().as_subclass(torch.Tensor).to(torch.float32)
    if isinstance(given, (list, tuple)):
        given = [_real_numbers(item).cpu().numpy() if isinstance(item, torch.Tensor) else item for item in given]
    # a masked number is a missing one: NaN, which is refused
    elif isinstance(given, np.ma.MaskedArray):
        given = np.ma.filled(given.astype(np.float64), np.nan)
    elif not hasattr(given, "__array__"):
        raise TypeError("neither a tensor nor an array nor a list")
    array = np.asarray(given)
    # fractions, decimals and whole numbers beyond 64 bits make an array of objects
    if array.dtype == object and all(isinstance(item, (numbers.Real, Decimal)) for item in array.flat):
        array = array.astype(np.float64)
    if array.dtype.kind not in "biuf":
        raise TypeError("not real numbers")
    # a number beyond fp32 becomes infinite, which is refused with the prompt's name
    with np.errstate(over="ignore"):
        return torch.from_numpy(array.astype(np.float32))


_THREAD_LOCAL = threading.local()


def _stream_of_thread(device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream of the thread that calls this.

    It is made once, as torch's allocator and cuBLAS keep memory for every stream that was ever used.
    """
    if not hasattr(_THREAD_LOCAL, "stream"):
        _THREAD_LOCAL.stream = torch.cuda.Stream(device)
    return _THREAD_LOCAL.stream


class _SameThread(Executor):
    """Calls a function in the thread that submits it; the future keeps what it returned or raised."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Scoring:
    """Scores batches by `score` while the next ones are sampled, in worker threads or in the caller's thread.

    On a GPU each call uses a stream of its thread, which waits only for the work that made its images, not for what was
    queued since.

    Args:
        executor: the worker threads; None to score in the caller's thread, at once.
        raises_early: whether `begin` raises what an earlier batch raised. Processes that sample together must not: one
            of them would leave the others waiting in a collective call.
    """

    def __init__(self, reward_function: RewardFunction, executor: Executor | None, raises_early: bool = True) -> None:
        self.reward_function = reward_function
        self.executor = executor or _SameThread()
        self.raises_early = raises_early
        # a progress bar that counts batches
        self.bar: Any = None
        # By the batch's `id`, which Python gives to another object once the batch is freed: the batch is kept with it.
        self._begun: dict[int, tuple[Sequence[Any], Future[tuple[torch.Tensor, Any]]]] = {}

    def begin(self, batch: Sequence[Any], ready: torch.cuda.Event | None = None) -> None:
        """Starts scoring a batch of (images, prompts, metadata). Raises what an earlier batch has raised so far.

        Args:
            ready: on a GPU, the event after which the images are complete (default: all that this thread has queued).
        """
        images = batch[0]
        if ready is None and isinstance(images, torch.Tensor) and images.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        scored = self.executor.submit(self._score, ready, *batch[:3])
        self._begun[id(batch)] = batch, scored
        if self.bar is not None:
            scored.add_done_callback(lambda _: self.bar.update())
        for _, begun in self._begun.values():
            if self.raises_early and begun.done():
                begun.result()

    def results(self, batches: Sequence[Sequence[Any]]) -> list[tuple[torch.Tensor, Any]]:
        """Waits for the scores of the batches, in their order; a batch that was not begun is started first."""
        for batch in batches:
            if id(batch) not in self._begun:
                self.begin(batch)
        futures = [self._begun[id(batch)][1] for batch in batches]
        try:
            return [future.result() for future in futures]
        finally:
            # after an error the batches that are still queued need no scores
            for future in futures:
                future.cancel()

    def _score(self, ready: torch.cuda.Event | None, images: torch.Tensor, *others: Any) -> tuple[torch.Tensor, Any]:
        if ready is None:
            return score(self.reward_function, images, *others)
        stream = _stream_of_thread(images.device)
        stream.wait_event(ready)
        # the allocator must not reuse the images' memory before this stream has read them
        images.record_stream(stream)
        with torch.cuda.stream(stream):
            rewards, metadata = score(self.reward_function, images, *others)
        # the caller reads the rewards in another stream, which does not wait for this one
        stream.synchronize()
        return rewards, metadata


class RewardRandom:
    """Restores the state that torch's random generators had before an epoch's rewards.

    A reward function that calls `torch.manual_seed` would otherwise make every epoch sample from the same noise.
    Python's and NumPy's generators are left as the prompt and reward functions leave them.
    """

    def __init__(self) -> None:
        self._torch: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        self._others_before: Any = None
        self._others_after: Any = None
        self._warned = False

    def begin(self) -> None:
        """To be called before an epoch's first reward, when all its noise has been drawn; later calls do nothing."""
        if self._torch is None:
            on_device = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
            self._torch = torch.get_rng_state(), on_device
            self._others_before = _others()

    def end(self) -> None:
        """To be called after an epoch's rewards, also after an error."""
        if self._torch is None:
            return
        on_host, on_device = self._torch
        torch.set_rng_state(on_host)
        for state in on_device:
            torch.cuda.set_rng_state(state)
        self._torch = None
        after = _others()
        # The same state after two epochs, and another before the rewards, shows that the reward function sets a seed.
        if after == self._others_after != self._others_before and not self._warned:
            self._warned = True
            logger.warning(
                "the reward function seeds Python's or NumPy's random generator, so that prompts drawn with it repeat "
                "every epoch: give the reward a generator of its own (random.Random, numpy.random.default_rng)"
            )
        self._others_after = after


def _others() -> tuple[Any, ...]:
    """The states of Python's and NumPy's global generators, in a form that `==` compares."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (name, np.asarray(keys).tobytes(), *rest)
