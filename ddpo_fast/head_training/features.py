"""The embeddings of a data set's images, kept on disk so that a killed run goes on where it stopped.

Shapes: N images, D the width of an embedding.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ddpo_fast.head_training.rows import Picture
from ddpo_fast.rewards.clip import ClipNetwork

# A file of embeddings is written after so many of them or so many seconds: what a kill can lose.
SHARD, SECONDS = 1024, 60
THREADS = min(16, os.cpu_count() or 1)


@dataclass
class Features:
    """Embeddings by the key of a picture.

    Args:
        embeds: unit-length embeddings [N, D] in fp32.
        rows: each key's row of `embeds`.
        digests: of the contents, by key: the same image under two names has one.
        problems: why a picture has no embedding, by key.
    """

    embeds: torch.Tensor
    rows: dict[str, int]
    digests: dict[str, str]
    problems: dict[str, str]


@dataclass
class _Cache:
    """Embeddings in a folder, in files that are each written once."""

    folder: Path
    keys: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    embeds: list[torch.Tensor] = field(default_factory=list)
    written: int = 0
    written_at: float = field(default_factory=time.monotonic)

    def read(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    names = json.loads(file.metadata()["pictures"])
                    self.embeds += file.get_tensor("embeds").unbind()
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"the embeddings in {str(path)!r} are damaged ({error}): delete that file") from error
            self.keys += [key for key, _ in names]
            self.digests += [digest for _, digest in names]
        self.written = len(self.keys)

    def add(self, key: str, digest: str, embed: torch.Tensor) -> None:
        self.keys.append(key)
        self.digests.append(digest)
        self.embeds.append(embed)
        if len(self.keys) - self.written >= SHARD or time.monotonic() - self.written_at > SECONDS:
            self.write()

    def write(self) -> None:
        """Writes what was added since the last time, renamed when complete, so that a kill leaves no half of a file."""
        if len(self.keys) == self.written:
            return
        new = slice(self.written, None)
        path = self.folder / f"{self.written:09d}.safetensors"
        partial = path.with_suffix(".partial")
        pictures = json.dumps(list(zip(self.keys[new], self.digests[new], strict=True)))
        save_file({"embeds": torch.stack(self.embeds[new])}, partial, {"pictures": pictures})
        partial.replace(path)
        self.written, self.written_at = len(self.keys), time.monotonic()


def embed_pictures(pictures: Sequence[Picture], clip: ClipNetwork, folder: Path, device: str, most: int) -> Features:
    """The embeddings of all pictures: those kept in `folder`, and new ones, which are kept there.

    Args:
        folder: of this CLIP alone.
        device: where images are embedded, unless `clip` has a device of its own.
        most: how many pictures may be broken. Raises `ValueError` when there are more, without reading on.
    """
    cache = _Cache(folder)
    cache.read()
    known, problems = set(cache.keys), dict[str, str]()
    wanted = {picture.key: picture for picture in pictures}
    missing = [picture for key, picture in wanted.items() if key not in known]
    edge = clip.image_format.resize
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc="embedding images", unit="image")
    with bar, ThreadPoolExecutor(THREADS) as threads:
        try:
            for batch in _loaded(missing, edge, clip.batch_size, threads):
                good = []
                for picture, future in batch:
                    try:
                        good.append((picture, *future.result()))
                    # Pillow raises errors of many types for damaged bytes
                    except Exception as error:
                        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                        problems[picture.key] = f"the image cannot be read ({reason:.200})"
                _embed(good, clip, device, cache)
                bar.update(len(batch))
                if len(problems) > most:
                    raise ValueError(
                        f"{len(problems)} images cannot be read, which is more than max_broken_share allows, such as "
                        f"{_name_of(next(iter(problems)))}: {next(iter(problems.values()))}; correct them or raise it"
                    )
        finally:
            # after an error or Ctrl-C as well: the next run goes on from here
            cache.write()
    return Features(
        torch.stack(cache.embeds) if cache.embeds else torch.zeros(0, 1),
        {key: row for row, key in enumerate(cache.keys)},
        dict(zip(cache.keys, cache.digests, strict=True)),
        problems,
    )


Loaded = tuple[str, torch.Tensor]


def _loaded(
    pictures: Sequence[Picture], edge: int, batch_size: int, threads: ThreadPoolExecutor
) -> Iterator[list[tuple[Picture, Future[Loaded]]]]:
    """Batches of pictures with what is loaded of them. The next batch is loaded while one is embedded."""
    ahead: list[tuple[Picture, Future[Loaded]]] = []
    for start in itertools.count(0, batch_size):
        batch = [(picture, threads.submit(load, picture, edge)) for picture in pictures[start : start + batch_size]]
        if ahead:
            yield ahead
        if not batch:
            return
        ahead = batch


def load(picture: Picture, edge: int) -> Loaded:
    """The digest of a picture's contents, and its central square in `edge` pixels, [3, edge, edge] in uint8.

    Resized by Pillow's bicubic filter, as the published CLIPs' processors do it.
    """
    data = picture.read()
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    square = ImageOps.fit(upright, (edge, edge), Image.Resampling.BICUBIC)
    return hashlib.sha256(data).hexdigest(), torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _embed(good: list[tuple[Picture, str, torch.Tensor]], clip: ClipNetwork, device: str, cache: _Cache) -> None:
    if not good:
        return
    images = torch.stack([pixels for _, _, pixels in good]).to(device).float() / 255
    embeds = clip.image_embeds(images).cpu()
    if not embeds.isfinite().all():
        worst = int((~embeds.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"the CLIP {clip.model!r} has no finite embedding of {_name_of(good[worst][0].key)}")
    for (picture, digest, _), embed in zip(good, embeds, strict=True):
        cache.add(picture.key, digest, embed.clone())


def _name_of(key: str) -> str:
    path, _, _, cell = json.loads(key)
    return path if cell is None else f"row {cell[0] + 1}, {cell[1]} of {path}"
