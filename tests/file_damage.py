"""What may happen to a file on a disk: cut short, with a bit changed, or gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def cut(share: float, less: int = 0) -> Callable[[Path], object]:
    """Damage that keeps a `share` of a file's bytes, and `less` of them than that."""
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share) - less])


def flip_a_bit(path: Path) -> None:
    """Changes a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def files_in(folder: Path) -> dict[str, bytes]:
    """The content of all files below a folder, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
