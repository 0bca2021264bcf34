"""Handles Ctrl-C, SIGTERM and SIGHUP in training: an update stops at once, but a checkpoint is written to its end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Under torchrun a process gets one Ctrl-C twice, from the terminal and from torchrun. A signal that comes within this
# many seconds of the first is taken for the same one.
SAME_SIGNAL_S = 0.5


class Signalled(SystemExit):
    """Raised for SIGTERM and SIGHUP, to tell them from a `SystemExit` of a user's function, which is a mistake."""


class Interruption:
    """A context in which a signal raises `KeyboardInterrupt` for Ctrl-C, and `Signalled(128 + number)` for the others.

    A signal that the program handles itself, or ignores, keeps its handler. Python sets and runs handlers only in the
    main thread: in another thread the context does nothing.
    """

    def __init__(self) -> None:
        # the number of the signal that came, 0 for none, and the time when it came
        self.received = 0
        self._received_at = 0.0
        # how many blocks of `suppressed` or `deferred` are entered
        self._depth = 0
        self._replaced: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self.received = self._depth = 0
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                present = signal.getsignal(number)
                if present in (signal.SIG_DFL, signal.default_int_handler):
                    self._replaced[number] = present
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced.clear()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A first signal in the block takes effect at its end; a second one raises at once, to skip the wait."""
        with self.suppressed():
            yield
        self.check()

    @contextmanager
    def suppressed(self) -> Iterator[None]:
        """A first signal in the block raises nothing, as training is ending anyway; a second one raises at once."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def check(self) -> None:
        """Raises again if a signal came earlier: an `except:` in a user's function may have caught the exception."""
        if self.received and not self._depth:
            self._raise()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        again = bool(self.received) and time.monotonic() - self._received_at > SAME_SIGNAL_S
        if self.received and not again:
            return
        self.received, self._received_at = number, time.monotonic()
        if again or not self._depth:
            self._raise()

    def _raise(self) -> None:
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt("training was stopped")
        raise Signalled(128 + self.received)
