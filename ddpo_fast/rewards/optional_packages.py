"""Optional packages that some rewards need: whether they are installed."""

from __future__ import annotations

import importlib.util


def require_packages(reward: str, extra: str, *modules: str) -> None:
    """Raises `ValueError` that names `extra`, an extra of pyproject.toml, if one of the modules is not installed.

    The modules are not imported, which may take seconds.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(
            f"reward {reward!r} needs {' and '.join(missing)}, which is not installed: "
            f"run pip install 'ddpo_fast[{extra}]'"
        )
