"""Decides from a model's config files, before any weight is read, whether the model can be trained.

A model that cannot be trained is refused in one sentence, with the reason and what to do, instead of an exception from
within diffusers or, worse, a run that trains the wrong thing (an inpainting UNet, for instance, takes other inputs).
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import errors, hf_hub_download
from transformers import CLIPTextConfig, T5Config

from ddpo_fast import tiny_sd
from ddpo_fast.families import Family, family_of, working
from ddpo_fast.single_file import SingleFile, file_of

# two ends of error messages
REMEDY = f"give a text-to-image {working()} as a diffusers folder or Hub id"
AGAIN = "copy or download the model again"
# endings of files with weights that are pickles
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
LIBRARIES = ("diffusers", "transformers")
# parts that are never loaded, and all parts that a run has no use for
UNLOADED_PARTS = ("safety_checker", "feature_extractor")
UNUSED_PARTS = (*UNLOADED_PARTS, "image_encoder")
SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class ModelConfigs:
    """The configs of a pipeline's parts by name, completed with the defaults of diffusers and transformers."""

    family: type[Family]
    parts: dict[str, dict[str, Any]]
    scheduler: dict[str, Any] = field(default_factory=dict)

    @property
    def unet(self) -> dict[str, Any]:
        """Of the part that is trained."""
        return self.parts[self.family.network]

    @property
    def text_encoder(self) -> dict[str, Any]:
        return self.parts["text_encoder"]

    @property
    def vae(self) -> dict[str, Any]:
        return self.parts["vae"]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of an image of the model's own size."""
        return self.family.latent_shape_of(self.parts)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of an image of the model's own size in pixels."""
        return self.family.image_size_of(self.parts)

    @property
    def sampling_scheduler(self) -> Any:
        """The scheduler that samples the model."""
        return self.family.make_scheduler(self.scheduler)


def check_model(
    name: str,
    revision: str = "main",
    steps: int | None = None,
    eta: float = 1.0,
    has_weights: bool = True,
    single_file_config: str = "",
) -> ModelConfigs:
    """Reads a model's configs from a folder, the Hub or its cache, checks them, and returns them.

    Args:
        name: folder, Hub id or single file; '' and 'bundled-flow' are the bundled models.
        revision: git revision on the Hub.
        steps: if given, the model must be able to take this number of sampling steps, with `eta`.
        has_weights: whether a folder must hold weights; predicting a run's memory needs none.
        single_file_config: where a single file's configs are, see `SingleFile.configs`.

    Raises `ValueError` with the reason and the remedy for a model that cannot be trained, and `OSError` for configs
    that cannot be read.
    """
    refusal = f"pretrained_model {name!r} cannot be trained"
    single, folder = _file_and_folder(name, single_file_config)
    if single is not None:
        refusal = f"pretrained_model {name!r} cannot be trained with the configs of {str(folder)!r}"
    try:
        index = _read(name, revision, folder, "model_index.json")
        family = _family(index)
        present = [part for part in (family.network, *family.frozen) if index.get(part, [None, None])[1] is not None]
        found = {
            part: _read(name, revision, folder, f"{part}/config.json", remedy=_remedy(part, family)) for part in present
        }
        scheduler = _read(name, revision, folder, SCHEDULER)
        parts = {part: _completed(part, index[part][1], config) for part, config in found.items()}
        configs = ModelConfigs(family, parts, scheduler)
        try:
            family.check(parts)
        except ValueError as error:
            raise ValueError(f"{error}: {REMEDY}") from None
        _check_fit(configs)
        for tokenizer in (part for part in family.parts if part.startswith("tokenizer")):
            file = _read(name, revision, folder, f"{tokenizer}/tokenizer_config.json", needed=False)
            _check_tokenizer(tokenizer, file, configs)
        sampler = configs.sampling_scheduler
        if single is not None:
            single.check_fits(family, parts, sampler)
        elif folder is not None:
            _check_files(folder, present, has_weights)
        if folder is not None:
            _check_tokenizers(folder, family, has_weights)
    except ValueError as error:
        raise ValueError(f"{refusal}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{refusal}: its configs are broken ({error!r})") from error
    if steps is not None:
        family.check_steps(sampler, steps, eta)
    return configs


def family_of_model(name: str, revision: str = "main") -> type[Family]:
    """The family of a model, told from its `model_index.json`, or the names of a single file's tensors, alone.

    Raises `ValueError` for a model that cannot be trained, and `OSError` for an index that cannot be read.
    """
    if (file := file_of(name)) is not None:
        return SingleFile(file).family
    return _family(_read(name, revision, model_folder(name), "model_index.json"))


def model_folder(name: str) -> Path | None:
    """Returns the local folder that `name` means, or None if it is a single file or a Hub id.

    Raises `ValueError` for a folder without a pipeline.
    """
    if name in tiny_sd.MODELS:
        return tiny_sd.MODELS[name]
    path = Path(name).expanduser()
    if path.is_file():
        return None
    if not path.exists() and not name.startswith(("/", "./", "../", "~")):
        return None
    if not (path / "model_index.json").exists():
        part = path / "config.json"
        what = " (it is one part of a pipeline: give the folder of the whole)" if part.exists() else ""
        raise ValueError(
            f"pretrained_model is {name!r}, which is no diffusers pipeline: it has no model_index.json{what}"
            if path.exists()
            else f"pretrained_model is {name!r}, and there is no such folder"
        )
    return path


def _file_and_folder(name: str, single_file_config: str) -> tuple[SingleFile | None, Path | None]:
    """The single file that `name` means, or None, and the local folder with its configs, or None for a Hub id.

    Raises what `SingleFile` and `model_folder` raise.
    """
    if (file := file_of(name)) is None:
        if single_file_config:
            raise ValueError(
                f"single_file_config is {single_file_config!r}, but pretrained_model {name!r} is no file, and has "
                "configs of its own: leave it out"
            )
        return None, model_folder(name)
    try:
        single = SingleFile(file)
        return single, single.configs(single_file_config)
    except ValueError as error:
        raise ValueError(f"pretrained_model {name!r} cannot be trained: {error}") from None


def variant_of(folder: Path, parts: Collection[str]) -> str | None:
    """The variant of a folder's weights ('fp16' in `model.fp16.safetensors`); None if all `parts` have some without.

    Where some parts have weights of a variant only, the others may have them without, as diffusers loads them.
    """
    names = {file.name for part in parts if (folder / part).is_dir() for file in (folder / part).iterdir()}
    variants = {m[1] for name in names if (m := re.match(r"(?:diffusion_pytorch_)?model\.([a-z0-9_]+)[.-]", name))}
    candidates = [None, *sorted(variants - {"safetensors", "bin"})]
    return next((v for v in candidates if all(weight_files(folder, part, v) for part in parts)), None)


def weights_stem(part: str) -> str:
    """The file name of a part's weights, without variant and ending."""
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


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


def _remedy(part: str, family: type[Family]) -> str:
    """What to do where a part of a model is missing."""
    if part not in family.optional:
        return REMEDY
    tokenizer = part.replace("text_encoder", "tokenizer")
    return f"{AGAIN}, or leave it out by [null, null] for {part} and {tokenizer} in its model_index.json"


def _read(
    name: str, revision: str, folder: Path | None, file: str, needed: bool = True, remedy: str = REMEDY
) -> dict[str, Any]:
    """Reads a config file; returns an empty dict if the file does not exist and is not `needed`."""
    try:
        path = folder / file if folder is not None else Path(hf_hub_download(name, file, revision=revision))
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, errors.RemoteEntryNotFoundError) as error:
        if not needed:
            return {}
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise OSError(hub_problem(name, error)) from error
        raise ValueError(f"it has no {file}: {remedy}") from None
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


def _family(index: Mapping[str, Any]) -> type[Family]:
    """The family of a model; raises `ValueError` unless `model_index.json` names the parts of one."""
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        # a list here names a file of code in the model's folder, for diffusers to run
        raise ValueError(f"its kind of pipeline is {kind!r}: {REMEDY}")
    family = family_of(index)
    parts = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    present = {name: value[1] for name, value in parts.items() if value[1] is not None}
    extra = sorted(present.keys() - family.parts.keys() - {"scheduler", *UNUSED_PARTS})
    missing = [name for name in (*family.parts, "scheduler") if name not in present and name not in family.optional]
    if extra or missing:
        what = f"has {_listed(extra)}" if extra else f"has no {_listed(missing)}"
        raise ValueError(f"it is a {kind}, which {what}: {REMEDY}")
    for name, known in family.parts.items():
        library, used = parts.get(name, (None, None))
        if name in present and (library not in LIBRARIES or used not in known):
            raise ValueError(f"its {name} is a {library}.{used} and must be a {' or '.join(known)}: {REMEDY}")
    for name in present.keys() - UNLOADED_PARTS:
        # any other library is a module in the model's folder, code that would be imported and run
        if parts[name][0] not in LIBRARIES:
            raise ValueError(
                f"its {name} is a {'.'.join(map(str, parts[name]))}, which is not of {LIBRARIES}: {REMEDY}"
            )
    return family


def _listed(names: list[str]) -> str:
    return " and ".join(names)


def _completed(part: str, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Completes the config of a part, of the class `kind`, with that class's defaults."""
    if hasattr(diffusers, kind):
        named = config.get("_class_name", kind)
        if named != kind:
            raise ValueError(f"its config says {named!r} where {kind!r} must be: {REMEDY}")
        parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
        defaults = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
        return {**defaults, **config}
    settings = T5Config if kind.startswith("T5") else CLIPTextConfig
    try:
        return settings.from_dict(dict(config)).to_dict()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{part}/config.json cannot be used: {first_line(error)}") from None


def _check_fit(configs: ModelConfigs) -> None:
    """Raises `ValueError` unless images of the model's own size can be decoded."""
    if not configs.vae["block_out_channels"]:
        raise ValueError("its VAE's block_out_channels are empty")
    scale = configs.vae["scaling_factor"]
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not scale > 0:
        raise ValueError(f"its VAE's scaling_factor is {scale!r} but must be a number above 0: {AGAIN}")
    height, width = configs.image_size
    step = configs.family.divisor(configs.parts)
    if height % step or width % step:
        raise ValueError(
            f"its images are {height} x {width}, which {step} does not divide: change its sample_size, or give height "
            "and width"
        )


def _check_tokenizer(tokenizer: str, settings: Mapping[str, Any], configs: ModelConfigs) -> None:
    """Raises `ValueError` if a tokenizer gives more tokens than its text encoder takes."""
    encoder = tokenizer.replace("tokenizer", "text_encoder")
    length, most = settings.get("model_max_length"), configs.parts.get(encoder, {}).get("max_position_embeddings")
    if isinstance(length, int | float) and most is not None and length > most:
        raise ValueError(
            f"its {tokenizer} gives up to {length:g} tokens (model_max_length), and its {encoder} takes {most}: set "
            f"model_max_length in {tokenizer}/tokenizer_config.json"
        )


def _check_files(folder: Path, networks: Collection[str], has_weights: bool) -> None:
    """Raises `ValueError` if a folder lacks a network's files, or has its weights as pickles only."""
    for part in networks:
        if not (folder / part).is_dir():
            raise ValueError(f"it has no folder {part}: {AGAIN}")
    variant = variant_of(folder, networks)
    for part in networks:
        stem = weights_stem(part)
        wanted = f"{part}/{stem}{f'.{variant}' if variant else ''}.safetensors"
        if weight_files(folder, part, variant):
            continue
        if pickles := sorted(p.name for p in (folder / part).iterdir() if p.suffix in PICKLES):
            raise ValueError(pickle_problem(f"{part}/{pickles[0]}"))
        if has_weights:
            raise ValueError(f"it has no {wanted}: {AGAIN}")


def _check_tokenizers(folder: Path, family: type[Family], has_weights: bool) -> None:
    """Raises `ValueError` if a folder lacks a tokenizer."""
    for part in (part for part in family.parts if part.startswith("tokenizer") and part not in family.optional):
        if not (folder / part).is_dir():
            raise ValueError(f"it has no folder {part}: {AGAIN}")
        files = ("tokenizer.json", "vocab.json", "spiece.model")
        if has_weights and not any((folder / part / file).exists() for file in files):
            raise ValueError(f"its {part} has neither tokenizer.json nor vocab.json: {AGAIN}")


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
