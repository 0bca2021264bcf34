"""The files of a reward's networks: found in a folder or on the Hub, and read without running anything in them."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import torch
from huggingface_hub import errors, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddpo_fast.model_configs import first_line, hub_problem
from ddpo_fast.tiny_sd import SCORER

# the name of the CLIP in this package, which scores the bundled model's images
BUNDLED = "bundled"
# how transformers names a network's weights; an index lists the files of weights that are in several
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def named_folder(name: str, part: str = "") -> str:
    """The folder of the bundled scorer, or of a part of it, for its name; any other name as it is."""
    return str(SCORER / part) if name == BUNDLED else name


def local_path(option: str, name: str) -> Path | None:
    """The file or folder that `name` means, or None if it is a Hub id.

    Raises `ValueError` for a path that does not exist; the message calls the setting `option`.
    """
    path = Path(name).expanduser()
    # the path of no name is the working directory
    if name and path.exists():
        return path
    if not name or name.startswith(("/", "./", "../", "~")) or name.count("/") != 1:
        raise ValueError(f"{option} is {name!r}, and there is no such folder: give one, or a Hub id OWNER/NAME")
    return None


def fetch(option: str, name: str, *files: str) -> Path:
    """The first of `files` that the folder or the Hub repository `name` has; from the Hub through its cache.

    Raises `ValueError` if there is none.
    """
    path = local_path(option, name)
    if path is not None:
        if not path.is_dir():
            raise ValueError(f"{option} is {name!r}, which is a file: give the folder that it is in")
        for file in files:
            if (path / file).is_file():
                return path / file
        raise ValueError(f"{option} is {name!r}, a folder without {' or '.join(files)}: copy or download it again")
    missing: Exception | None = None
    for file in files:
        try:
            return Path(hf_hub_download(name, file))
        except errors.EntryNotFoundError as error:
            missing = error
        except (OSError, ValueError) as error:
            raise ValueError(hub_problem(name, error, option)) from error
    # without a network, a file that is not in the cache
    if isinstance(missing, errors.LocalEntryNotFoundError):
        raise ValueError(hub_problem(name, missing, option)) from missing
    raise ValueError(f"{option} {name!r} on the Hub has no {' or '.join(files)}: give another repository or a folder")


def fetch_weights(option: str, name: str) -> list[Path]:
    """The files of the network's weights that the folder or the Hub repository `name` has: one, or those of an index.

    Raises `ValueError` if there are none, if one is missing, or for an index that is broken.
    """
    path = fetch(option, name, *WEIGHTS)
    if path.suffix != ".json":
        return [path]
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        # a path would lead out of the folder
        if not files or any(Path(file).name != file for file in files):
            raise ValueError(f"it lists {files[:3]}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is not the index of a network's files ({first_line(error)}): copy or download it again"
        ) from error
    return [fetch(option, name, file) for file in files]


def file_of(option: str, name: str, *files: str) -> Path:
    """`name` if it is a local file, else the first of `files` in it, as `fetch` finds it."""
    path = local_path(option, name)
    return path if path is not None and path.is_file() else fetch(option, name, *files)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file in host memory, from safetensors or from a pickle that holds nothing but data.

    A pickle is read by `torch.load(weights_only=True)`, which refuses to call anything. Its tensors may be one level
    down, under `state_dict`. Raises `ValueError` for any other file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # a file of the zip format is mapped, so that looking at shapes alone reads no weights
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} is refused, as it holds more than tensors and reading the rest could run code (or it is "
            "damaged): download it again from where it was published, or save its tensors as safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, SafetensorError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({first_line(error)}): copy or download it again") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{str(path)!r} holds no weights: a mapping of names to tensors is needed")
    return found
