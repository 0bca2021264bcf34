"""`ddpo-fast train-reward`: a reward head on CLIP's embeddings of rated or compared images."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ddpo_fast.commands.early_checks import check_can_write
from ddpo_fast.commands.options import HeadArguments
from ddpo_fast.head_training import agreement, fit, picture
from ddpo_fast.head_training.features import Features, embed_pictures
from ddpo_fast.head_training.rows import Row, Rows, read_rows, shown
from ddpo_fast.head_training.split import groups_of, validation_rows
from ddpo_fast.interruption import Interruption, Signalled
from ddpo_fast.rewards.clip import IMAGE_FORMATS, ClipNetwork
from ddpo_fast.rewards.weight_files import fetch, fetch_weights
from ddpo_fast.run_folder import files, folder_lock, pictures

# fewer rows cannot be divided into two parts that say anything
LEAST_ROWS = 10
HEAD, CONFIG, PICTURE, SKIPPED = "head.safetensors", "config.json", "predicted.png", "skipped.txt"


def run(options: HeadArguments) -> None:
    """Trains a head, prints how well it agrees with validation rows, and writes a folder that `--reward` takes.

    Raises `ValueError` for options or data that cannot be used.
    """
    folder = Path(options.output_dir).expanduser()
    if (folder / HEAD).exists() and not options.overwrite:
        raise ValueError(f"output_dir is {str(folder)!r}, which has a head: choose another folder, or add --overwrite")
    check_can_write(folder, "output_dir")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    clip = ClipNetwork(options.clip, text=False, device=device, batch_size=options.clip_batch_size, option="clip")

    # the data, as far as it can be checked without the CLIP
    rows = read_rows(Path(options.data).expanduser(), Path(options.images).expanduser() if options.images else None)
    rows.check(options.max_broken_share)
    check_rows(rows)

    folder.mkdir(parents=True, exist_ok=True)
    if problem := folder_lock.lock(folder):
        raise ValueError(f"output_dir is {problem}")
    try:
        # SIGTERM raises as Ctrl-C does, and the embeddings that were made are written
        with Interruption():
            train(options, rows, clip, device, folder)
    except (KeyboardInterrupt, Signalled):
        print("stopped: the same command goes on with the embeddings that are kept", file=sys.stderr)
        raise
    finally:
        folder_lock.unlock(folder)


def train(options: HeadArguments, rows: Rows, clip: ClipNetwork, device: str, folder: Path) -> None:
    """Embeds the images of the rows, fits a head on some of them, measures it on the others, and writes it."""
    features = embed_pictures(
        [found for row in rows.usable for found in row.pictures],
        clip,
        folder / "features" / clip_digest(clip)[:16],
        device,
        most=int(options.max_broken_share * (len(rows.usable) + len(rows.broken))),
    )
    rows = without_broken_pictures(rows, features)
    rows.check(options.max_broken_share)
    check_rows(rows)
    (folder / SKIPPED).write_text("".join(f"{line}\n" for line in rows.broken), encoding="utf-8")
    if rows.broken:
        print(f"skipped {len(rows.broken)} rows, which {SKIPPED} lists: {shown(rows.broken)}", flush=True)

    keys = [row_keys(row, features) for row in rows.usable]
    groups = groups_of(keys)
    aside = validation_rows(groups, keys, options.validation_share, options.seed)
    embeds = embeds_of(rows.usable, features)
    targets = torch.tensor([row.target for row in rows.usable], dtype=torch.float32)
    check_training_targets(targets[torch.from_numpy(~aside)], rows.are_pairs)
    what, shared = ("pairs", "no image and no caption") if rows.are_pairs else ("rows", "no image")
    print(f"training on {(~aside).sum()} {what}, validating on {aside.sum()} that share {shared} with them", flush=True)

    training = torch.from_numpy(~aside)
    found: dict[str, Any] = {}
    if options.head == "linear":
        head, found["penalty"] = fit.fit_linear(embeds[training], targets[training], groups[~aside], options.seed)
    else:
        found |= {name: getattr(options, name) for name in ("epochs", "batch_size", "learning_rate")}
        head = fit.fit_mlp(embeds[training], targets[training], seed=options.seed, **found)
    outputs = fit.predicted(head, embeds[~training]).numpy().astype(np.float64)
    given = targets[~training].numpy().astype(np.float64)
    measure = agreement.of_pairs if rows.are_pairs else agreement.of_ratings
    metrics = measure(outputs, given, groups[aside])

    pictures.attempt(picture.draw, outputs, given, rows.are_pairs, folder / PICTURE)
    config = {
        "clip": clip_name(options.clip),
        "head": options.head,
        "loss": "bradley_terry" if rows.are_pairs else "mean_squared_error",
        "data": Path(options.data).name,
        "rows": {"training": int((~aside).sum()), "validation": int(aside.sum()), "skipped": len(rows.broken)},
        "seed": options.seed,
        **found,
        "validation": metrics,
    }
    write(folder, config, head)
    print(summary(metrics), flush=True)
    print(f"the head is in {folder}: use it by --reward aesthetic --reward_model {folder}", flush=True)


def check_rows(rows: Rows) -> None:
    """Raises `ValueError` if there are too few rows, or nothing that tells images apart."""
    count, targets = len(rows.usable), {row.target for row in rows.usable}
    if count < LEAST_ROWS:
        raise ValueError(f"the data has {count} usable rows, and a head needs at least {LEAST_ROWS}: add rows")
    if rows.are_pairs and targets == {0.5}:
        raise ValueError(f"all {count} pairs are ties, which no head can learn from: add pairs with a preference")
    if not rows.are_pairs and len(targets) == 1:
        raise ValueError(f"all {count} scores are {targets.pop():g}, which no head can learn from: add other scores")


def check_training_targets(targets: torch.Tensor, are_pairs: bool) -> None:
    """Raises `ValueError` if what is left for training has no differences."""
    if (targets == (0.5 if are_pairs else targets[0])).all():
        raise ValueError(
            "all rows but those for validation have the same score or are ties: add rows, or choose another seed"
        )


def without_broken_pictures(rows: Rows, features: Features) -> Rows:
    """The rows whose pictures all have embeddings; the others are added to the broken ones."""
    kept = Rows(broken=list(rows.broken))
    for row in rows.usable:
        broken = next((found for found in row.pictures if found.key in features.problems), None)
        if broken is not None:
            kept.broken.append(f"{row.place}: {broken.path.name}: {features.problems[broken.key]}")
        else:
            kept.usable.append(row)
    return kept


def row_keys(row: Row, features: Features) -> list[str]:
    """What rows of two sides must not share: contents of images, and the caption of a pair."""
    keys = [features.digests[found.key] for found in row.pictures]
    return [*keys, f"caption {row.caption}"] if row.caption else keys


def embeds_of(rows: Sequence[Row], features: Features) -> torch.Tensor:
    """[N, D] of ratings, [N, 2, D] of pairs."""
    found = torch.tensor([[features.rows[p.key] for p in row.pictures] for row in rows])
    return features.embeds[found.squeeze(1)]


def clip_digest(clip: ClipNetwork) -> str:
    """A digest of the CLIP's weights and of how it takes images: embeddings are kept by it."""
    read = [*fetch_weights("clip", clip.model), fetch("clip", clip.model, *IMAGE_FORMATS)]
    return hashlib.sha256("".join(map(files.digest, read)).encode()).hexdigest()


def clip_name(name: str) -> str:
    """The CLIP's Hub id or name, or its folder's whole path, so that the head works from any folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def write(folder: Path, config: dict[str, Any], head: torch.nn.Sequential) -> None:
    """Writes the head last: a folder with a head is complete."""
    for name, save in (
        (CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")),
        (HEAD, lambda path: save_file(fit.head_tensors(head), path)),
    ):
        partial = folder / f".{name}.partial"
        save(partial)
        partial.replace(folder / name)
    files.follow_umask(folder, HEAD)


def summary(metrics: dict[str, Any]) -> str:
    """The metrics in a line, with their 95 % intervals."""
    parts = []
    for name, label in (("spearman", "Spearman"), ("pairwise_accuracy", "pairwise accuracy")):
        if metrics.get(name) is not None:
            low, high = metrics[f"{name}_interval"]
            parts.append(f"{label} {metrics[name]:.3f} ({low:.3f} to {high:.3f})")
    return "validation: " + (", ".join(parts) or "nothing to measure, as all its rows have one score or are ties")
