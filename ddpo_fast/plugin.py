"""`module:function` on the command line: the user's own reward or prompt function."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def load_function(option: str, spec: str) -> Callable[..., Any]:
    """The callable that `spec` ('module:function') names; the working directory is searched too.

    Raises `ValueError` naming `option` and what is missing.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"{option} is {spec!r} but must be a name from the list or 'module:function'")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name, None)
    except Exception as error:
        raise ValueError(f"{option} is {spec!r}, and importing {module_name} failed: {error!r}") from error
    if not callable(function):
        raise ValueError(f"{option} is {spec!r}, but module {module_name} has no function {name!r}")
    return function
