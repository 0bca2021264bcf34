"""What the scripts of `bench/` share. Importing this package makes the checkout importable.

The checkout's root and its `kernels/` are put first on `sys.path`, so that a script runs without an installed package.
Unless `ddpo_fast` has been imported already, an empty package with the same search path takes its place, so that
`ddpo_fast/__init__.py` does not run. Import modules such as `ddpo_fast.config` or `ddpo_fast.ops` here, never a name of
`ddpo_fast` itself: those names import diffusers and transformers, which take seconds, and which a machine that only
times ops may not have.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCH, KERNELS = ROOT / "bench", ROOT / "kernels"
RECORDS = BENCH / "records"

sys.path[:0] = [str(ROOT), str(KERNELS)]
if "ddpo_fast" not in sys.modules:
    package = types.ModuleType("ddpo_fast")
    package.__path__ = [str(ROOT / "ddpo_fast")]
    sys.modules["ddpo_fast"] = package


def python_path() -> str:
    """The value of PYTHONPATH with which a child process finds this package, for `python -m lib.MODULE`."""
    return os.pathsep.join(filter(None, [str(BENCH), os.environ.get("PYTHONPATH")]))
