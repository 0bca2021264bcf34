"""Names of a package that are imported when they are first used (PEP 562), as torch and peft take seconds to import."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The function `__getattr__` of `package`, which Python calls for a name that the package does not have.

    Args:
        modules: for each name, the module in the package that defines it.
    """

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        # stored, so that Python finds the name without calling this function again
        setattr(sys.modules[package], name, value)
        return value

    return find
