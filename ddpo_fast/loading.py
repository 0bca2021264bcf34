"""Loads a model's pipeline from files, each part in the precision that it is stored in.

safetensors maps a file into memory. A tensor that is not converted stays a view of the file: it takes no memory until
it is read, and the system can drop it again. So a part is loaded as it is stored, and converted where it is used:
frozen parts on their way to the device, trained weights to fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from packaging.version import Version

from ddpo_fast.model_configs import (
    ModelConfigs,
    check_model,
    first_line,
    model_folder,
    pickle_problem,
    variant_of,
    weight_files,
)
from ddpo_fast.safetensors_header import stored_dtype
from ddpo_fast.single_file import SingleFile, file_of

# The argument of `from_pretrained` for precision: `dtype`, whose older name diffusers warns about since 0.42. A dict
# has a precision for each part.
DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
IN_FP32: dict[str, Any] = {DTYPE: torch.float32}


def load_pipeline(name: str, revision: str = "main", single_file_config: str = "") -> Any:
    """Loads a model's diffusers pipeline from a folder, a single file or the Hub, in the stored precisions.

    Its scheduler is the one that it is sampled with. Its attribute `stored_dtypes` has the precisions by part.

    Raises `ValueError` for a model that cannot be trained, `OSError` for one that cannot be read.
    """
    configs = check_model(name, revision, single_file_config=single_file_config)
    family = configs.family
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
        file = file_of(name)
        if file is not None:
            pipe = _from_single_file(SingleFile(file), configs, single_file_config, options)
        else:
            pipe = _from_folder(name, revision, configs, options)
    except Exception as error:
        reason = first_line(error)
        if "`safetensors` weights" in reason:
            raise ValueError(f"pretrained_model {name!r} cannot be trained: {pickle_problem('.bin files')}") from None
        raise OSError(f"pretrained_model {name!r} could not be loaded: {reason}") from error
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


def _from_folder(name: str, revision: str, configs: ModelConfigs, options: dict[str, Any]) -> Any:
    kind: Any = getattr(diffusers, configs.family.pipelines[0])
    folder = model_folder(name) or Path(kind.download(name, revision=revision, **options))
    variant = variant_of(folder, configs.parts)
    stored = stored_dtypes(folder, variant, configs.parts)
    pipe = kind.from_pretrained(
        str(folder), variant=variant, **options, **{DTYPE: {**stored, "default": torch.float32}}
    )
    pipe.stored_dtypes = stored
    return pipe


def _from_single_file(single: SingleFile, configs: ModelConfigs, given: str, options: dict[str, Any]) -> Any:
    """The pipeline of a file, as diffusers converts it. Raises `ValueError` if the file lacks weights of a part."""
    kind: Any = getattr(diffusers, configs.family.pipelines[0])
    folder, dtype = str(single.configs(given)), single.dtype
    try:
        pipe = kind.from_single_file(
            str(single.path), config=folder, local_files_only=True, **options, **{DTYPE: dtype}
        )
    except NotImplementedError as error:
        # weights that the file has not are left without values
        raise ValueError(f"it lacks weights that the configs of {folder!r} ask for: give those of its kind") from error
    pipe.stored_dtypes = dict.fromkeys(configs.parts, dtype)
    return pipe


def stored_dtypes(folder: Path, variant: str | None, parts: Iterable[str]) -> dict[str, torch.dtype]:
    """The precision of each of the parts' weights in a folder, from the headers of its files."""
    return {part: stored_dtype(folder / part / file for file in weight_files(folder, part, variant)) for part in parts}
