"""Runs `ddpo-fast train` and kills it at a call of a function: by time it would be elsewhere on a busy machine."""

from __future__ import annotations

import os
import pkgutil
import signal

from ddpo_fast import cli


def kill_at(place: str, count: int) -> None:
    owner, name = place.rsplit(".", 1)
    owner, calls = pkgutil.resolve_name(owner), []
    called = getattr(owner, name)

    def counted(*arguments, **options):
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return called(*arguments, **options)

    setattr(owner, name, counted)


def run(place: str, count: int, *options: str) -> None:
    """Trains in this process until the `count`-th call of `place`, the full name of a function."""
    kill_at(place, count)
    cli.main(["train", *options])
