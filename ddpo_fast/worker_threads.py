"""Worker threads that do not delay the end of the program, so that a Ctrl-C does not wait for a slow reward."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any


class WorkerThreads(Executor):
    """An executor of up to `count` daemon threads, which are started when there is work.

    `concurrent.futures.ThreadPoolExecutor` joins its threads when the interpreter exits, even after
    `shutdown(wait=False)`.
    """

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self.name = name
        self._start_over()

    def _start_over(self) -> None:
        self._work: SimpleQueue[Any] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        weakref.finalize(self, _end, self._work, self._threads)

    @contextmanager
    def abandoned_on_error(self) -> Iterator[None]:
        """A context that calls `abandon` if the block raises (also for a signal), so that nothing waits for threads."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Lets the threads finish queued and running calls, whose results are dropped; `submit` starts new threads."""
        self.shutdown(wait=False)
        self._start_over()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queues a call of `function` and returns its future."""
        future: Future[Any] = Future()
        self._work.put((future, function, args, kwargs))
        if len(self._threads) < self.count:
            name = f"{self.name}_{len(self._threads)}"
            thread = threading.Thread(target=_run, args=(self._work,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Lets each thread end when the work that is queued is done; waits for that if `wait`."""
        _end(self._work, self._threads)
        for thread in self._threads if wait else []:
            thread.join()


def _run(work: SimpleQueue[Any]) -> None:
    """The work of a thread: it makes the calls from the queue until it gets None."""
    while (item := work.get()) is not None:
        future, function, args, kwargs = item
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        # the variables of a thread that waits for work would keep the last batch's images in memory
        del item, future, function, args, kwargs


def _end(work: SimpleQueue[Any], threads: list[threading.Thread]) -> None:
    """Queues one None for each thread, behind the work that is queued already."""
    for _ in threads:
        work.put(None)
