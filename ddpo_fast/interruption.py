"""Ctrl-C, SIGTERM and SIGHUP while a run trains: what is under way is given up, and a checkpoint is not."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# a terminal and torchrun both pass a Ctrl-C on: within this many seconds it is the same one
REPEAT_S = 0.5


class Signalled(SystemExit):
    """SIGTERM or SIGHUP came: unlike a user's function that exits, it is no mistake."""


class Interruption:
    """A context in which a signal ends the training: `KeyboardInterrupt` for Ctrl-C, else `Signalled(128 + number)`.

    It leaves alone what others handle or ignore, and whatever happens outside of the main thread.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._asked_at = 0.0
        self._holds = 0
        self._replaced: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self.asked = self._holds = 0
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                present = signal.getsignal(number)
                if present in (signal.SIG_DFL, signal.default_int_handler):
                    self._replaced[number] = present
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, was in self._replaced.items():
            signal.signal(number, was)
        self._replaced.clear()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A first signal waits for the end of this; a second one does not."""
        with self.suppressed():
            yield
        self.check()

    @contextmanager
    def suppressed(self) -> Iterator[None]:
        """A first signal is lost in here, as the training has ended already."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1

    def check(self) -> None:
        """Raises what was asked for and has not come through: somebody's `except:` may have caught it."""
        if self.asked and not self._holds:
            self._raise()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        again = bool(self.asked) and time.monotonic() - self._asked_at > REPEAT_S
        if self.asked and not again:
            return
        self.asked, self._asked_at = number, time.monotonic()
        if again or not self._holds:
            self._raise()

    def _raise(self) -> None:
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt("training was stopped")
        raise Signalled(128 + self.asked)
