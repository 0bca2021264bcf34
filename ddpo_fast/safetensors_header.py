"""What a safetensors file says of its tensors at its beginning, read without the tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

# safetensors' names
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_header(file: Path) -> dict[str, Any]:
    """A safetensors file's tensors by name, with `dtype` and `shape`, without reading them; and `__metadata__`.

    Raises `OSError` for a file that is none.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        # safetensors takes no longer header
        text = stream.read(size) if size <= 100_000_000 else b""
    try:
        header = json.loads(text)
        assert isinstance(header, dict)
    except (ValueError, AssertionError):
        raise OSError(f"{file} is no safetensors file, or damaged: copy it again") from None
    return header


def stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """The precision that holds all numbers in safetensors files: theirs, fp32 for a mixture, bf16 for 8 bits."""
    return dtype_of(entry for file in files for entry in read_header(file).values())


def dtype_of(entries: Iterable[dict[str, Any]]) -> torch.dtype:
    """The precision that holds all numbers of a header's `entries`."""
    names = {entry["dtype"] for entry in entries if "dtype" in entry}
    floats = {STORED.get(name, torch.bfloat16) for name in names if re.match(r"B?F\d", name)}
    return floats.pop() if len(floats) == 1 else torch.float32
