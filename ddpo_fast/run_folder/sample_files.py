"""samples/epoch_N in a run's folder: images of fixed prompts and noise after N epochs, with their rewards.

samples/epoch_00010/
    000.jpg 001.jpg ...     an image for each fixed prompt
    samples.json            {"epoch": 10, "samples": [{"file", "prompt", "reward", "rewards": {name: reward}}]}
    best_0.jpg worst_0.jpg  the images of the epoch's training with the highest and the lowest rewards
    extremes.json           the same entries for these
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

FOLDER = "samples"
SAMPLES, EXTREMES = "samples.json", "extremes.json"
# of JPEG files, from 1 to 95: at 90 what is lost cannot be seen
QUALITY = 90


class Sample(NamedTuple):
    """An image as it is kept: the bytes of its JPEG file, and of several rewards each one's by its name."""

    jpeg: bytes
    prompt: str
    reward: float
    rewards: dict[str, float]


def as_jpeg(pixels: np.ndarray) -> bytes:
    """An image [H, W, 3] in uint8 as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.getvalue()


def folder_of(run: Path, epochs: int) -> Path:
    """Where the images after so many epochs are kept."""
    return run / FOLDER / f"epoch_{epochs:05d}"


def folders_in(run: Path) -> list[Path]:
    """The folders of the epochs with images, in their order."""
    return sorted((run / FOLDER).glob("epoch_*"))


def first_and_last(folders: Sequence[Path]) -> tuple[list[str], list[tuple[str, torch.Tensor, list[float]]]]:
    """The last epoch's prompts, and the rows of a grid that compares the first epoch's images with the last one's."""
    prompts, rows = list[str](), []
    for folder in (folders[0], folders[-1]):
        read = json.loads((folder / SAMPLES).read_text(encoding="utf-8"))
        entries = read["samples"]
        images = [np.array(Image.open(folder / Path(entry["file"]).name).convert("RGB")) for entry in entries]
        shown = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
        prompts = [entry["prompt"] for entry in entries]
        rows.append((f"epoch {read['epoch']}", shown, [entry["reward"] for entry in entries]))
    return prompts, rows


def write(
    run: Path, epochs: int, samples: Sequence[Sample], best: Sequence[Sample] = (), worst: Sequence[Sample] = ()
) -> Path:
    """Writes the folder of `epochs` and returns it; one of this name, of a run that has been resumed, is replaced.

    It appears under its name when it is complete, and until then the old one stays.
    """
    folder = folder_of(run, epochs)
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_part(partial, epochs, SAMPLES, {f"{i:03d}.jpg": sample for i, sample in enumerate(samples)})
    extremes = {f"best_{i}.jpg": sample for i, sample in enumerate(best)}
    extremes |= {f"worst_{i}.jpg": sample for i, sample in enumerate(worst)}
    if extremes:
        _write_part(partial, epochs, EXTREMES, extremes)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _write_part(folder: Path, epochs: int, name: str, files: dict[str, Sample]) -> None:
    entries: list[dict[str, Any]] = []
    for file, sample in files.items():
        (folder / file).write_bytes(sample.jpeg)
        entries.append({"file": file, "prompt": sample.prompt, "reward": sample.reward, "rewards": sample.rewards})
    text = json.dumps({"epoch": epochs, "samples": entries}, indent=1, ensure_ascii=False)
    (folder / name).write_text(text + "\n", encoding="utf-8")
