"""What rewards that ask a server share: their settings' checks, requests side by side, and what errors may show."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from typing import TypeVar
from urllib.parse import urlsplit

from ddpo_fast.worker_threads import WorkerThreads

Item = TypeVar("Item")
Result = TypeVar("Result")
# The jitter of back-offs has a generator of its own: Python's global one draws a run's prompts, and a server that is
# busy for a moment must not change them.
JITTER = random.Random()


def checked_url(reward: str, url: str | None, example: str) -> str:
    """The URL of a server without a slash at its end. Raises `ValueError` for what is none, or holds a password."""
    if not url:
        raise ValueError(f"reward {reward!r} needs the URL of a server: give --reward_url, such as {example}")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"reward_url is {url!r} but must be the URL of a server, such as {example}")
    if parts.username is not None:
        raise ValueError(f"reward_url must be without user name and password, such as {example}")
    return url.rstrip("/")


def check_settings(retries: int, **positive: float) -> None:
    """Raises `ValueError` that names the first setting that is too small; retries may be zero."""
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"reward setting {name} is {value} but must be above zero")
    if retries < 0:
        raise ValueError(f"reward setting retries is {retries} but must not be negative")


def find_secret(name: str, given: str | None, variable: str) -> str | None:
    """The secret that was given, or else the environment's; None if there is none.

    Raises `ValueError` for one that no HTTP header can carry, without showing it.
    """
    secret = (given or os.environ.get(variable, "")).strip()
    if not (secret.isascii() and secret.isprintable()):
        raise ValueError(f"{name} (or the environment's {variable}) has characters that an HTTP header cannot have")
    return secret or None


def beginning(text: str, secret: str | None) -> str:
    """The beginning of a server's answer or of an error, on one line, without the secret that it may repeat."""
    line = " ".join(text.split())
    if secret:
        line = line.replace(secret, "[secret]")
    return line if len(line) <= 300 else f"{line[:297]}..."


def in_parallel(call: Callable[[Item], Result], items: Sequence[Item], concurrency: int) -> list[Result]:
    """`call(item)` of each item, up to `concurrency` at a time in threads; results in the items' order.

    The first error ends it: calls that are queued are dropped, and nothing waits for those that run.
    """
    threads = WorkerThreads(min(concurrency, len(items)), "request")
    futures = [threads.submit(call, item) for item in items]
    try:
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        threads.shutdown(wait=False)
