"""Work that runs ahead in a thread of its own, while whoever uses its results keeps the thread that called.

Sampling does, and not the user's reward: a reward may be bound to the main thread by signals, event loops, connections
to data bases, or whatever else belongs to a thread.
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
    """Nobody waits for the result any more."""


class Ahead(Generic[T]):
    """The items of `items`, made by a thread in order; what it raises is raised where they are used.

    Iterating gives (item, event): on a GPU the event is behind all that the item was made by, and before what follows.

    Args:
        stop: set for the thread to give up between two items; what makes them may look at it too, and raise `Stopped`.
    """

    def __init__(self, items: Iterator[T], device: torch.device, stop: threading.Event) -> None:
        self._items = items
        self._device = device
        self._stop = stop
        self._made: SimpleQueue[tuple[T, torch.cuda.Event | None] | BaseException | None] = SimpleQueue()
        # a thread starts with the machine's number of threads for an op, and on the first GPU
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
        """Returns once the thread is at rest: nothing is computed behind the caller's back."""
        self._stop.set()
        self._thread.join()
        self._stop.clear()


@contextmanager
def ahead(
    items: Iterator[T], device: torch.device, stop: threading.Event
) -> Iterator[Iterator[tuple[T, torch.cuda.Event | None]]]:
    """`items` made by a thread while the block runs; see `Ahead`."""
    worker = Ahead(items, device, stop)
    worker.start()
    try:
        yield iter(worker)
    finally:
        worker.give_up()
