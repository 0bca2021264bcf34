"""Loads a model's pipeline from files, each part in the precision that it is stored in.

safetensors maps a file into memory. A tensor that is not converted stays a view of the file: it takes no memory until
it is read, and the system can drop it again. So a part is loaded as it is stored, and converted where it is used:
frozen parts on their way to the device, trained weights to fp32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from packaging.version import Version

from ddpo_fast.model_configs import (
    check_model,
    first_line,
    model_folder,
    pickle_problem,
    variant_of,
    weight_files,
)

# The argument of `from_pretrained` for precision: `dtype`, whose older name diffusers warns about since 0.42. A dict
# has a precision for each part.
DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
IN_FP32: dict[str, Any] = {DTYPE: torch.float32}
# safetensors' names
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_pipeline(name: str, revision: str = "main") -> Any:
    """Loads a model's diffusers pipeline from a folder or the Hub, in the stored precisions.

    Its scheduler is the one that it is sampled with. Its attribute `stored_dtypes` has the precisions by part.

    Raises `ValueError` for a model that cannot be trained, `OSError` for one that cannot be read.
    """
    configs = check_model(name, revision)
    family = configs.family
    kind: Any = getattr(diffusers, family.pipelines[0])
    options: dict[str, Any] = {
        "use_safetensors": True,
        "scheduler": configs.sampling_scheduler,
        # diffusers does not take a part as optional because the index has none
        **dict.fromkeys(
            part for part in family.optional if part.replace("tokenizer", "text_encoder") not in configs.parts
        ),
        **family.unloaded,
    }
    try:
        folder = model_folder(name) or Path(kind.download(name, revision=revision, **options))
        variant = variant_of(folder, configs.parts)
        stored = stored_dtypes(folder, variant, configs.parts)
        pipe: Any = kind.from_pretrained(
            str(folder), variant=variant, **options, **{DTYPE: {**stored, "default": torch.float32}}
        )
    except Exception as error:
        reason = first_line(error)
        if "`safetensors` weights" in reason:
            raise ValueError(f"pretrained_model {name!r} cannot be trained: {pickle_problem('.bin files')}") from None
        raise OSError(f"pretrained_model {name!r} could not be loaded: {reason}") from error
    pipe.stored_dtypes = stored
    # Looking up the embedding of a token that has none is an index out of range. On a GPU that is a device-side
    # assertion, after which the process cannot use the device any more.
    for tokenizer in (part for part in family.parts if part.startswith("tokenizer")):
        encoder = tokenizer.replace("tokenizer", "text_encoder")
        if getattr(pipe, encoder, None) is None:
            continue
        given, known = len(getattr(pipe, tokenizer)), getattr(pipe, encoder).get_input_embeddings().num_embeddings
        if given > known:
            raise ValueError(
                f"pretrained_model {name!r} cannot be trained: its {tokenizer} has {given} tokens, and its {encoder} "
                f"knows {known}: they are not of one model"
            )
    return pipe


def stored_dtypes(folder: Path, variant: str | None, parts: Iterable[str]) -> dict[str, torch.dtype]:
    """The precision of each of the parts' weights in a folder, from the headers of its files."""
    return {part: stored_dtype(folder / part / file for file in weight_files(folder, part, variant)) for part in parts}


def stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """The precision that holds all numbers in safetensors files: theirs, fp32 for a mixture, bf16 for 8 bits."""
    names = {entry["dtype"] for file in files for entry in read_header(file).values() if "dtype" in entry}
    floats = {STORED.get(name, torch.bfloat16) for name in names if re.match(r"B?F\d", name)}
    return floats.pop() if len(floats) == 1 else torch.float32


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
