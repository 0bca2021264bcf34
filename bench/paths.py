"""Lets the scripts here import the ops from a checkout, and the ops alone.

The package itself imports diffusers and transformers, which take seconds and may be missing where only ops are timed.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
if "ddpo_fast" not in sys.modules:
    package = types.ModuleType("ddpo_fast")
    package.__path__ = [str(ROOT / "ddpo_fast")]
    sys.modules["ddpo_fast"] = package
