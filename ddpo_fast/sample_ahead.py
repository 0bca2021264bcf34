"""Sampling in a thread of its own, while the caller's thread scores what has been sampled.

Sampling runs in the new thread, and not the user's reward function, because a reward function may need the main thread:
for signals, an event loop or a connection to a database.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Stopped(Exception):
    """Raised in the sampling thread to end it when the remaining items are not needed."""


class Ahead(Generic[T]):
    """An iterator whose items a thread makes in order, before they are asked for.

    Iterating gives (item, event), and raises what the thread raised. On a GPU the event is recorded after the kernels
    that made the item and before those of the next: a consumer that waits for it does not wait for the next item.

    Args:
        stop: set to end the thread after the item in progress. The code that makes the items may check it too, and
            raise `Stopped` to end sooner.
    """

    def __init__(self, items: Iterator[T], device: torch.device, stop: threading.Event) -> None:
        self._items = items
        self._device = device
        self._stop = stop
        self._made: SimpleQueue[tuple[T, torch.cuda.Event | None] | BaseException | None] = SimpleQueue()
        # PyTorch's number of CPU threads and the current GPU are settings of a thread: a new one has the defaults
        self._threads_of_ops = torch.get_num_threads()
        self._thread = threading.Thread(target=self._work, name="sampling")

    def _work(self) -> None:
        try:
            torch.set_num_threads(self._threads_of_ops)
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            for item in self._items:
                self._made.put((item, self._event()))
                if self._stop.is_set():
                    raise Stopped
        except BaseException as error:
            self._made.put(error)
        else:
            self._made.put(None)

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def __iter__(self) -> Iterator[tuple[T, torch.cuda.Event | None]]:
        while (made := self._made.get()) is not None:
            if isinstance(made, BaseException):
                raise made
            yield made

    def start(self) -> None:
        self._stop.clear()
        self._thread.start()

    def give_up(self) -> None:
        """Stops the thread and waits until it has ended."""
        self._stop.set()
        self._thread.join()
        self._stop.clear()


@contextmanager
def ahead(
    items: Iterator[T], device: torch.device, stop: threading.Event
) -> Iterator[Iterator[tuple[T, torch.cuda.Event | None]]]:
    """A context in which a thread makes `items` while the caller iterates over those that are ready; see `Ahead`."""
    worker = Ahead(items, device, stop)
    worker.start()
    try:
        yield iter(worker)
    finally:
        worker.give_up()
