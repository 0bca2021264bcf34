"""Loads a model's pipeline from files."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from packaging.version import Version

from ddpo_fast.model_configs import check_model, first_line, model_folder, pickle_problem, variant_of

# the argument that makes `from_pretrained` load in fp32: `dtype`, whose older name diffusers warns about since 0.42
IN_FP32: dict[str, Any] = {
    "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype": torch.float32
}


def load_stable_diffusion(name: str, revision: str = "main") -> Any:
    """Loads a `StableDiffusionPipeline` with a DDIM scheduler from a folder or the Hub, in fp32 whatever is stored.

    Raises `ValueError` for a model that cannot be trained, `OSError` for one that cannot be read.
    """
    configs = check_model(name, revision)
    folder = model_folder(name)
    try:
        pipe: Any = StableDiffusionPipeline.from_pretrained(
            str(folder or name),
            revision=revision,
            variant=variant_of(folder) if folder else None,
            use_safetensors=True,
            scheduler=configs.ddim,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **IN_FP32,
        )
    except Exception as error:
        reason = first_line(error)
        if "`safetensors` weights" in reason:
            raise ValueError(f"pretrained_model {name!r} cannot be trained: {pickle_problem('.bin files')}") from None
        raise OSError(f"pretrained_model {name!r} could not be loaded: {reason}") from error
    # Looking up the embedding of a token that has none is an index out of range. On a GPU that is a device-side
    # assertion, after which the process cannot use the device any more.
    known = pipe.text_encoder.get_input_embeddings().num_embeddings
    if len(pipe.tokenizer) > known:
        raise ValueError(
            f"pretrained_model {name!r} cannot be trained: its tokenizer has {len(pipe.tokenizer)} tokens, and its "
            f"text_encoder knows {known}: they are not of one model"
        )
    return pipe
