"""Decides from a model's config files, before any weight is read, whether the model can be trained.

A model that cannot be trained is refused in one sentence, with the reason and what to do, instead of an exception from
within diffusers or, worse, a run that trains the wrong thing (an inpainting UNet, for instance, takes other inputs).
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import errors, hf_hub_download
from packaging.version import Version
from transformers import CLIPTextConfig

from ddpo_fast import tiny_sd
from ddpo_fast.ddim import check_steps, ddim_scheduler

# two ends of error messages
REMEDY = "give a text-to-image Stable Diffusion 1.x or 2.x as a diffusers folder or Hub id"
AGAIN = "copy or download the model again"
# endings of files with weights that are pickles
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# the parts of a pipeline that a run uses, and the classes that each may have
PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
LIBRARIES = ("diffusers", "transformers")
# parts that are never loaded, and all parts that a run has no use for
UNLOADED_PARTS = ("safety_checker", "feature_extractor")
UNUSED_PARTS = (*UNLOADED_PARTS, "image_encoder")
CONFIGS = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
# file names of the weights, without variant and ending
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# the tasks of UNets whose input has more channels than their output, by the number of input channels
CHANNELS = {9: "inpainting", 8: "editing or upscaling", 7: "upscaling", 5: "depth"}
# settings of a UNet that has inputs beside latents, timestep and text, which the trainer would not give it
CONDITIONS = {
    "time_cond_proj_dim": "a guidance scale as an input (a latent consistency model)",
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
    "addition_embed_type": "a second embedding, as Stable Diffusion XL",
    "encoder_hid_dim": "a projection of another encoder's output",
    "encoder_hid_dim_type": "a projection of another encoder's output",
}


@dataclass(frozen=True)
class ModelConfigs:
    """The configs of a pipeline's parts, completed with diffusers' defaults."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any] = field(default_factory=dict)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image's latents."""
        size = self.unet["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet["in_channels"], height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of an image in pixels."""
        _, height, width = self.latent_shape
        # each block of the VAE but the last halves the image
        scale = 2 ** (len(self.vae["block_out_channels"]) - 1)
        return height * scale, width * scale

    @property
    def ddim(self) -> DDIMScheduler:
        """The DDIM scheduler that samples the model."""
        return ddim_scheduler(self.scheduler)


def check_model(
    name: str, revision: str = "main", steps: int | None = None, eta: float = 1.0, has_weights: bool = True
) -> ModelConfigs:
    """Reads a model's configs from a folder, the Hub or its cache, checks them, and returns them.

    Args:
        name: folder or Hub id; '' is the bundled model.
        revision: git revision on the Hub.
        steps: if given, the model must be able to take this number of sampling steps, with `eta`.
        has_weights: whether a folder must hold weights; predicting a run's memory needs none.

    Raises `ValueError` with the reason and the remedy for a model that cannot be trained, and `OSError` for configs
    that cannot be read.
    """
    folder = model_folder(name)
    try:
        _check_parts(_read(name, revision, folder, "model_index.json"))
        found = {part: _read(name, revision, folder, file) for part, file in CONFIGS.items()}
        tokenizer = _read(name, revision, folder, "tokenizer/tokenizer_config.json", needed=False)
        configs = ModelConfigs(
            _with_defaults(UNet2DConditionModel, found["unet"]),
            _with_defaults(AutoencoderKL, found["vae"]),
            _text_config(found["text_encoder"]),
            found["scheduler"],
        )
        _check_unet(configs.unet)
        _check_fit(configs, tokenizer)
        scheduler = configs.ddim
        if folder is not None:
            _check_files(folder, has_weights)
    except ValueError as error:
        raise ValueError(f"pretrained_model {name!r} cannot be trained: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"pretrained_model {name!r} cannot be trained: its configs are broken ({error!r})") from error
    if steps is not None:
        check_steps(scheduler, steps, eta)
    return configs


def model_folder(name: str) -> Path | None:
    """Returns the local folder that `name` means, or None if it is a Hub id.

    Raises `ValueError` for a file, and for a folder without a pipeline.
    """
    if name == "":
        return tiny_sd.MODEL
    path = Path(name).expanduser()
    if not path.exists() and not name.startswith(("/", "./", "../", "~")):
        return None
    if path.is_file():
        raise ValueError(
            f"pretrained_model is {name!r}, which is a file: make a folder of it with "
            "StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
        )
    if not (path / "model_index.json").exists():
        part = path / "config.json"
        what = " (it is one part of a pipeline: give the folder of the whole)" if part.exists() else ""
        raise ValueError(
            f"pretrained_model is {name!r}, which is no diffusers pipeline: it has no model_index.json{what}"
            if path.exists()
            else f"pretrained_model is {name!r}, and there is no such folder"
        )
    return path


def variant_of(folder: Path) -> str | None:
    """The variant of a folder's weights ('fp16' in `model.fp16.safetensors`); None if all parts have some without.

    Where some parts have weights of a variant only, the others may have them without, as diffusers loads them.
    """
    names = {file.name for part in WEIGHTS if (folder / part).is_dir() for file in (folder / part).iterdir()}
    variants = {m[1] for name in names if (m := re.match(r"(?:diffusion_pytorch_)?model\.([a-z0-9_]+)[.-]", name))}
    candidates = [None, *sorted(variants - {"safetensors", "bin"})]
    return next((v for v in candidates if all(weight_files(folder, part, v) for part in WEIGHTS)), None)


def weight_files(folder: Path, part: str, variant: str | None) -> list[str]:
    """The names of the weights that a part is loaded from: those of the variant, else those without.

    They may be split, as in `model-00001-of-00002.safetensors`; an incomplete set counts as none.
    """
    names = [file.name for file in (folder / part).iterdir()] if (folder / part).is_dir() else []
    for middle in (rf"\.{variant}", "") if variant else ("",):
        pattern = rf"(?:diffusion_pytorch_)?model{middle}(?:-\d+-of-(\d+))?\.safetensors"
        found = {name: m[1] for name in names if (m := re.fullmatch(pattern, name))}
        if whole := [name for name, parts in found.items() if parts is None]:
            return whole
        if found and len(found) == int(next(iter(found.values()))):
            return sorted(found)
    return []


def _read(name: str, revision: str, folder: Path | None, file: str, needed: bool = True) -> dict[str, Any]:
    """Reads a config file; returns an empty dict if the file does not exist and is not `needed`."""
    try:
        path = folder / file if folder is not None else Path(hf_hub_download(name, file, revision=revision))
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, errors.RemoteEntryNotFoundError) as error:
        if not needed:
            return {}
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise OSError(hub_problem(name, error)) from error
        raise ValueError(f"it has no {file}: {REMEDY}") from None
    except (OSError, ValueError) as error:
        if folder is None:
            raise OSError(hub_problem(name, error)) from error
        raise OSError(f"pretrained_model is {name!r}, whose {file} cannot be read: {first_line(error)}") from error
    try:
        found = json.loads(text)
    except ValueError as error:
        raise OSError(f"pretrained_model {name!r} is broken: its {file} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise OSError(f"pretrained_model {name!r} is broken: its {file} holds no settings")
    return found


def hub_problem(name: str, error: Exception, option: str = "pretrained_model") -> str:
    """A sentence that says why a file of the Hub id `name`, given as `option`, could not be fetched, and what to do."""
    start = f"{option} {name!r} is no folder here, and as a Hub id"
    if isinstance(error, errors.GatedRepoError):
        return f"{start} it is gated: accept its terms on its page and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{start} it does not exist, or is private: check its name, and log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{start} it has no such revision: check pretrained_revision"
    if isinstance(error, errors.HFValidationError):
        return f"{start} it is not valid: give a folder that exists, or OWNER/NAME"
    return (
        f"{start} it can neither be reached nor is it in the cache: fetch it where there is a network, with "
        f"`hf download {name} --local-dir FOLDER`, and give that folder"
    )


def _check_parts(index: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless `model_index.json` names the parts of a text-to-image Stable Diffusion 1.x or 2.x."""
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        # a list here names a file of code in the model's folder, for diffusers to run
        raise ValueError(f"its kind of pipeline is {kind!r}: {REMEDY}")
    parts = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    present = {name: value[1] for name, value in parts.items() if value[1] is not None}
    extra = sorted(present.keys() - PARTS.keys() - {"scheduler", *UNUSED_PARTS})
    missing = [name for name in (*PARTS, "scheduler") if name not in present]
    if extra or missing:
        what = f"has {_listed(extra)}" if extra else f"has no {_listed(missing)}"
        raise ValueError(f"it is a {kind}, which {what}: {REMEDY}")
    for name, known in PARTS.items():
        library, used = parts[name]
        if library not in LIBRARIES or used not in known:
            raise ValueError(f"its {name} is a {library}.{used} and must be a {' or '.join(known)}: {REMEDY}")
    for name in present.keys() - UNLOADED_PARTS:
        # any other library is a module in the model's folder, code that would be imported and run
        if parts[name][0] not in LIBRARIES:
            raise ValueError(
                f"its {name} is a {'.'.join(map(str, parts[name]))}, which is not of {LIBRARIES}: {REMEDY}"
            )


def _listed(names: list[str]) -> str:
    return " and ".join(names)


def _with_defaults(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Completes the config of a diffusers class with the defaults of its constructor."""
    named = config.get("_class_name", kind.__name__)
    if named != kind.__name__:
        raise ValueError(f"its config says {named!r} where {kind.__name__!r} must be: {REMEDY}")
    parameters = inspect.signature(kind.__init__).parameters
    defaults = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return {**defaults, **config}


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return CLIPTextConfig.from_dict(dict(config)).to_dict()
    except (TypeError, ValueError) as error:
        raise ValueError(f"text_encoder/config.json cannot be used: {first_line(error)}") from None


def _check_unet(unet: dict[str, Any]) -> None:
    """Raises `ValueError` for a UNet with other inputs than the trainer gives it. Repairs old configs in place."""
    taken, given = unet["in_channels"], unet["out_channels"]
    if taken != given:
        kind = f", as one for {CHANNELS[taken]} does" if taken in CHANNELS else ""
        raise ValueError(f"its UNet takes {taken!r} channels and gives {given!r}{kind}: {REMEDY}")
    for key, what in CONDITIONS.items():
        if unet.get(key) is not None:
            raise ValueError(f"its UNet takes {what} ({key} is {unet[key]!r}): {REMEDY}")
    size = unet["sample_size"]
    edges = [size, size] if isinstance(size, int) else size
    if not (isinstance(edges, list | tuple) and len(edges) == 2 and all(_is_count(edge) for edge in edges)):
        raise ValueError(f"its UNet's sample_size is {size!r} but must be a number or [height, width] of latents")
    # `StableDiffusionPipeline`'s constructor repairs configs of diffusers before 0.9 in the same way
    version = unet.get("_diffusers_version")
    if isinstance(size, int) and size < 64 and version and Version(Version(version).base_version) < Version("0.9.0"):
        unet["sample_size"] = 64


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_fit(configs: ModelConfigs, tokenizer: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless the parts' sizes fit each other: text width and length, channels, and image size."""
    widths, width = configs.unet["cross_attention_dim"], configs.text_encoder["hidden_size"]
    for given in widths if isinstance(widths, list | tuple) else [widths]:
        if given != width:
            raise ValueError(f"its UNet takes text of width {given!r}, and its text_encoder gives {width}: {REMEDY}")
    channels, latent = configs.unet["in_channels"], configs.vae["latent_channels"]
    if channels != latent:
        raise ValueError(f"its UNet takes {channels!r} channels, and its VAE gives {latent!r}: {REMEDY}")
    length, most = tokenizer.get("model_max_length"), configs.text_encoder["max_position_embeddings"]
    if not _is_count(len(configs.vae["block_out_channels"])):
        raise ValueError("its VAE's block_out_channels are empty")
    scale = configs.vae["scaling_factor"]
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not scale > 0:
        raise ValueError(f"its VAE's scaling_factor is {scale!r} but must be a number above 0: {AGAIN}")
    height, width = configs.image_size
    if height % 8 or width % 8:
        raise ValueError(f"its images are {height} x {width}, which 8 does not divide: change its UNet's sample_size")
    if isinstance(length, int | float) and length > most:
        raise ValueError(
            f"its tokenizer gives up to {length:g} tokens (model_max_length), and its text_encoder takes {most}: set "
            "model_max_length in tokenizer/tokenizer_config.json"
        )


def _check_files(folder: Path, has_weights: bool) -> None:
    """Raises `ValueError` if a folder lacks a part's files, or has its weights as pickles only."""
    for part in PARTS:
        if not (folder / part).is_dir():
            raise ValueError(f"it has no folder {part}: {AGAIN}")
    variant = variant_of(folder)
    for part, stem in WEIGHTS.items():
        wanted = f"{part}/{stem}{f'.{variant}' if variant else ''}.safetensors"
        if weight_files(folder, part, variant):
            continue
        if pickles := sorted(p.name for p in (folder / part).iterdir() if p.suffix in PICKLES):
            raise ValueError(pickle_problem(f"{part}/{pickles[0]}"))
        if has_weights:
            raise ValueError(f"it has no {wanted}: {AGAIN}")
    if has_weights and not any((folder / "tokenizer" / file).exists() for file in ("tokenizer.json", "vocab.json")):
        raise ValueError(f"its tokenizer has neither tokenizer.json nor vocab.json: {AGAIN}")


def pickle_problem(file: str) -> str:
    """The end of a sentence that says why weights in `file`, a pickle, are not read, and what to do."""
    return (
        f"its weights are in {file}, a pickle, which can run code when it is read: if you trust where it comes from, "
        "make safetensors of it with StableDiffusionPipeline.from_pretrained(model, use_safetensors=False)"
        ".save_pretrained(new_folder)"
    )


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its class's name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
