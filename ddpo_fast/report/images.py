"""Images that a run has kept, embedded so that the page needs no other file.

`samples/epoch_00000/` holds `samples.json`, `{"epoch": 0, "samples": [{"file", "prompt", "reward", "rewards"}]}`, and
the images that it names, of fixed prompts and noise; `extremes.json`, of the same form, lists the best and the worst
images that the epoch was trained on. What is missing or damaged is left out.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from ddpo_fast.report.run_records import number

# An image is shown at most this large, in pixels a side; larger ones are made smaller.
LARGEST_SIDE = 384
JPEG_QUALITY = 82
# Images of a run are embedded up to about this many bytes: of more epochs, some are left out.
BUDGET = 6_000_000
# Before it is known how large they are: what an epoch's images are assumed to take.
MOST_EPOCHS = 60
# The grid of images before and after training, which is wide.
LARGEST_GRID = 1600

Epoch = dict[str, Any]


def sample_epochs(folder: Path) -> tuple[list[Epoch], int]:
    """The kept images of some epochs, the first and the last among them, and how many epochs have any.

    An epoch is `{"epoch", "samples": [{"src", "prompt", "reward", "rewards"}]}` with images as data URIs.
    """
    folders = sorted((each for each in folder.glob("samples/epoch_*") if each.is_dir()), key=_epoch_in_name)
    listed = [(each, found) for each in folders if (found := _listed(each / "samples.json"))]
    if not listed:
        return [], 0
    chosen = _evenly(listed, MOST_EPOCHS)
    epochs = [_with_images(*each) for each in chosen]
    epochs = [epoch for epoch in epochs if epoch["samples"]]
    size = sum(len(sample["src"]) for epoch in epochs for sample in epoch["samples"])
    if size > BUDGET:
        epochs = _evenly(epochs, max(2, int(len(epochs) * BUDGET / size)))
    return epochs, len(listed)


def extremes(folder: Path) -> Epoch | None:
    """The best and worst images of the last epoch that kept them: `{"epoch", "best": [...], "worst": [...]}`."""
    for each in sorted(folder.glob("samples/epoch_*"), key=_epoch_in_name, reverse=True):
        if found := _listed(each / "extremes.json"):
            epoch = _with_images(each, found)
            kinds = {
                kind: [sample for sample in epoch["samples"] if sample["file"].startswith(f"{kind}_")]
                for kind in ("best", "worst")
            }
            if any(kinds.values()):
                return {"epoch": epoch["epoch"], **kinds}
    return None


def before_after(folder: Path) -> str | None:
    """The picture `before_after.png`, or the latest that compares with a later epoch, as a data URI; None without."""
    found = [*folder.glob("before_after.png"), *folder.glob("epoch_*_after.png")]
    for path in sorted(found, key=_written_at, reverse=True):
        if source := _embedded(path, LARGEST_GRID):
            return source
    return None


def _listed(path: Path) -> dict[str, Any] | None:
    """A list of images, or None if it is missing or damaged, as it may be while it is written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("samples"), list) else None


def _with_images(folder: Path, listed: dict[str, Any]) -> Epoch:
    samples = []
    for entry in listed["samples"]:
        # a name, and no path out of the folder
        if not isinstance(entry, dict) or Path(str(entry.get("file"))).name != entry.get("file"):
            continue
        if source := _embedded(folder / entry["file"], LARGEST_SIDE):
            parts = entry.get("rewards")
            rewards = {str(name): number(value) for name, value in parts.items()} if isinstance(parts, dict) else {}
            sample = {"file": entry["file"], "src": source, "prompt": str(entry.get("prompt", ""))}
            samples.append({**sample, "reward": number(entry.get("reward")), "rewards": rewards})
    epoch = number(listed.get("epoch"))
    return {"epoch": int(_epoch_in_name(folder) if epoch is None else epoch), "samples": samples}


def _embedded(path: Path, largest: int) -> str | None:
    """An image file as a data URI, made smaller if a side has more than `largest` pixels; None if it is damaged."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            kind = (image.format or "").lower()
            if max(image.size) > largest or kind not in ("jpeg", "webp", "png"):
                image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
                made = io.BytesIO()
                image.convert("RGB").save(made, "JPEG", quality=JPEG_QUALITY)
                content, kind = made.getvalue(), "jpeg"
            else:
                # a file that is cut off raises here
                image.load()
    # Pillow raises errors of many types for damaged bytes
    except Exception:
        return None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _evenly(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


def _epoch_in_name(path: Path) -> int:
    digits = path.name.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else -1


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
