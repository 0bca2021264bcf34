"""LoRA adapters (arXiv 2106.09685) by peft: finding, loading, checking, training and saving them.

A UNet may have several adapters. The one that is trained has the name `ADAPTER`: it is new, or was found in a file
beside the model. Other adapters that the user loaded stay active and frozen.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
)
from huggingface_hub import _CACHED_NO_EXIST, constants, errors, hf_hub_download, try_to_load_from_cache
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ddpo_fast.families import Family
from ddpo_fast.model_configs import first_line, hub_problem, model_folder, pickle_problem
from ddpo_fast.quantize_frozen import unquantized
from ddpo_fast.single_file import file_of
from ddpo_fast.temporary_values import temporary_values

# diffusers' and TRL's name of an adapter's file
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
# the name of the adapter that is trained: peft's default, which TRL uses
ADAPTER = "default"
# an adapter's file in kohya's layout, which ComfyUI and A1111 read
KOHYA_WEIGHTS = "kohya_lora_weights.safetensors"
KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
TRL_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
TRL_RANK = 4
# the settings that determine, apart from its weights, what an adapter adds to a layer
SCALE_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
# for error messages: how to merge an adapter into a model
FUSE_COMMANDS = "pipe.fuse_lora(); pipe.unload_lora_weights(); pipe.save_pretrained(new_folder)"


def find_adapter(name: str, revision: str = "main") -> Path | None:
    """Returns the adapter's file beside a model, downloaded if the model is on the Hub, or None if there is none.

    Raises `OSError` if the Hub cannot be asked whether there is one, `ValueError` if the file is a pickle.
    """
    if file_of(name) is not None:
        return None
    folder = model_folder(name)
    if folder is not None:
        path = folder / LORA_WEIGHTS
        if path.exists():
            return path
        pickled = path.with_suffix(".bin")
        if pickled.exists():
            raise ValueError(f"pretrained_model {name!r} has an adapter, but {pickle_problem(pickled.name)}")
        return None
    try:
        return Path(hf_hub_download(name, LORA_WEIGHTS, revision=revision))
    except errors.RemoteEntryNotFoundError:
        return None
    except errors.LocalEntryNotFoundError as error:
        if _is_surely_absent(name, revision):
            return None
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise OSError(
            f"pretrained_model {name!r} may have an adapter ({LORA_WEIGHTS}), and the Hub cannot be asked{offline}: "
            f"fetch all of it where there is a network, with `hf download {name} --local-dir FOLDER`, and give that "
            "folder"
        ) from error
    except (OSError, ValueError) as error:
        raise OSError(hub_problem(name, error)) from error


def _is_surely_absent(name: str, revision: str) -> bool:
    """Whether huggingface_hub's cache knows, without a network, that a model has no adapter."""
    if try_to_load_from_cache(name, LORA_WEIGHTS, revision=revision) is _CACHED_NO_EXIST:
        return True
    # huggingface_hub 2 keeps the list of a repository's files, and has no entry for a file that is missing
    list_cached = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if list_cached is None:
        return False
    try:
        return LORA_WEIGHTS not in {file.path for file in list_cached(name, revision=revision)}
    except errors.CachedRepoTreeNotFoundError:
        return False


def load_adapter(family: Family, path: Path) -> None:
    """Loads an adapter's file into a model's network, and its text encoders if the file has parts for them.

    Raises `OSError` for a file that cannot be read, or that belongs to another kind of model.
    """
    parts = (family.denoiser, *family.text_encoders.values())
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        with ExitStack() as stack:
            stack.enter_context(_without_warnings_of_parts())
            for part in parts:
                stack.enter_context(_as_if_in_fp32(part))
            if any("lora" in name for name in names):
                family.pipe.load_lora_weights(
                    str(path.parent), weight_name=path.name, adapter_name=ADAPTER, use_safetensors=True
                )
        if not any(ADAPTER in getattr(part, "peft_config", {}) for part in parts):
            raise ValueError(f"nothing in it is for this kind of model (it has {next(iter(names), 'nothing')!r})")
    except Exception as error:
        raise OSError(
            f"the adapter {path} cannot be loaded by diffusers: {first_line(error)}; copy it again if it is damaged, "
            "or move it away for a new one"
        ) from error


def _as_if_in_fp32(network: nn.Module) -> AbstractContextManager[None]:
    """A context in which a network's weights have the dtype fp32, and no values.

    peft makes an adapter in the precision of the weights that it lies on. Weights that are stored in half precision
    would round the adapter, which is trained in fp32.
    """
    weights = [weight for name, weight in network.named_parameters() if "lora_" not in name]
    # one element that is expanded to a weight's shape takes no memory
    return temporary_values(weights, [torch.zeros((), device=w.device).expand(w.shape) for w in weights])


@contextmanager
def _without_warnings_of_parts() -> Iterator[None]:
    """A context in which diffusers does not warn that a file has nothing for one of the networks, as most have not."""

    def is_other(record: logging.LogRecord) -> bool:
        return "No LoRA keys associated" not in record.getMessage()

    loggers = [logging.getLogger(f"diffusers.loaders.{name}") for name in ("lora_base", "peft")]
    for logger in loggers:
        logger.addFilter(is_other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_other)


def check_options(unet: Any, path: Path, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Raises `ValueError` if an option contradicts the adapter that was loaded from `path`.

    The options have TRL's defaults, so a default counts as not given.
    """
    loaded = unet.peft_config[ADAPTER]
    adapted = {
        name for name, layer in _adapted_layers(unet) if ADAPTER in layer.lora_A or ADAPTER in layer.lora_embedding_A
    }
    same_layers = set(targets) == set(TRL_TARGETS) or set(find_targets(unet, targets)) == adapted
    for name, given, real, fits in (
        ("lora_rank", rank, loaded.r, rank in (TRL_RANK, loaded.r)),
        ("lora_alpha", alpha, loaded.lora_alpha, alpha in (TRL_RANK, loaded.lora_alpha)),
        ("lora_target_modules", ",".join(targets), ",".join(sorted(loaded.target_modules)), same_layers),
    ):
        if not fits:
            raise ValueError(
                f"{name} is {given}, and the adapter {path} that training goes on with has {real}: leave {name} out, "
                f"or make one model of both first ({FUSE_COMMANDS})"
            )


def find_targets(unet: nn.Module, targets: Sequence[str]) -> list[str]:
    """Returns the names of a UNet's layers that LoRA's target modules select.

    As in peft, a target 'x' selects the layers whose name is 'x' or ends with '.x'. Raises `ValueError` for a target
    that selects no layer, or a layer that cannot have an adapter.
    """
    names = _layers_by_name(unet)
    found = []
    for target in targets:
        selected = _selected(names, target)
        if not selected:
            raise ValueError(
                f"lora_target_modules names {target!r}, and the network has no such layer: name layers that it has, "
                "such as to_q, to_k, to_v, to_out.0, proj_in, ff.net.2 or conv1"
            )
        for name in selected:
            if not isinstance(names[name], nn.Linear | nn.Conv2d | BaseTunerLayer):
                raise ValueError(
                    f"lora_target_modules names {target!r}, a {type(names[name]).__name__}, and an adapter goes on "
                    "linear and convolution layers: name those in it"
                )
        found += selected
    if not found:
        raise ValueError("lora_target_modules names no layer: leave it out for TRL's")
    return found


def usual_targets(family: Family) -> list[str]:
    """Those of the family's usual target modules that the network has: one of few blocks may lack some."""
    return [target for target in family.targets if _selected(_layers_by_name(family.denoiser), target)]


def _layers_by_name(network: nn.Module) -> dict[str, nn.Module]:
    # layers that have an adapter are wrapped: the original lies in `base_layer`, the adapter's parts in `lora_A`, ...
    return {name.replace(".base_layer", ""): layer for name, layer in network.named_modules() if "lora_" not in name}


def _selected(names: Iterable[str], target: str) -> list[str]:
    return [name for name in names if name == target or name.endswith(f".{target}")]


def check_new_adapter(unet: nn.Module, config: LoraConfig) -> None:
    """Raises `ValueError` for an adapter whose layers do not exist, or whose rank is above that of all of them."""
    layers: dict[str, Any] = dict(unet.named_modules())
    sizes: list[int] = []
    for name in find_targets(unet, list(config.target_modules or ())):
        layer = layers[name]
        base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        # a convolution's weight [O, I, H, W] counts as a matrix [O, I H W]
        sizes.append(min(base.weight.shape[0], base.weight[0].numel()))
    if config.r > max(sizes):
        raise ValueError(
            f"lora_rank is {config.r}, and the largest layer to be adapted has rank {max(sizes)}: choose at most that"
        )


def add_adapter(unet: Any, config: LoraConfig) -> None:
    """Makes the adapter that is trained, unless it exists, and makes its parameters the only trainable ones.

    Other active adapters stay active and are frozen. Raises `ValueError` if an adapter was merged into the weights but
    not unloaded: peft computes a merged layer without any adapter, so that the trained one would have no effect.
    """
    before = [layer for _, layer in _adapted_layers(unet)]
    if any(layer.merged for layer in before):
        raise ValueError(
            "a LoRA was fused into the UNet and not unloaded: call pipeline.sd_pipeline.unload_lora_weights()"
        )
    active = [name for layer in before[:1] if not layer.disable_adapters for name in layer.active_adapters]
    if ADAPTER not in getattr(unet, "peft_config", {}):
        with warnings.catch_warnings(), _as_if_in_fp32(unet):
            # peft warns that the UNet already has other adapters, which is meant here
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            unet.add_adapter(config, ADAPTER)
    for _, layer in _adapted_layers(unet):
        layer.enable_adapters(True)
        layer.set_adapter([*(name for name in active if name != ADAPTER), ADAPTER])
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora_" in name and ADAPTER in name.split("."))


def check_no_adapter(unet: Any) -> None:
    """Raises `ValueError` if a UNet whose weights are all to be trained has an adapter."""
    if has_adapter(unet):
        raise ValueError(
            "a LoRA is loaded in the UNet, and use_lora is False: fuse it first, with "
            "pipeline.sd_pipeline.fuse_lora(); pipeline.sd_pipeline.unload_lora_weights(), or train with use_lora=True"
        )


def _adapted_layers(network: nn.Module) -> list[tuple[str, Any]]:
    """The layers that peft has wrapped, with their names."""
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]


def has_adapter(network: nn.Module) -> bool:
    """Whether a network has any adapter."""
    return bool(_adapted_layers(network))


def without_adapter(network: Any) -> Any:
    """Returns a network without adapters that shares the weights of `network` and has its class's parameter names.

    The trained adapter is left out, and other active adapters are merged into copies of the weights that they change.
    """
    # on the device `meta` nothing is allocated or initialised: all weights are assigned below
    with torch.device("meta"):
        made = type(network).from_config if hasattr(network, "from_config") else type(network)
        plain = made(network.config)
    weights = {name.replace(".base_layer", ""): p for name, p in network.state_dict().items() if "lora_" not in name}
    for name, layer in _adapted_layers(network):
        others = [other for other in layer.active_adapters if other != ADAPTER]
        if others and not layer.disable_adapters:
            fused = unquantized(copy.deepcopy(layer))
            fused.merge(adapter_names=others)
            weights |= {f"{name}.{key}": value for key, value in fused.get_base_layer().state_dict().items()}
    plain.load_state_dict(weights, assign=True)
    return plain


def save_adapter(family: Family, network: Any, output_dir: str | Path) -> None:
    """Writes the trained adapter of `network`, and its parts for text encoders that were loaded with it."""
    written: dict[str, Any] = {}
    for name, part in ((family.network, network), *family.text_encoders.items()):
        if ADAPTER in getattr(part, "peft_config", {}):
            state = get_peft_model_state_dict(part, adapter_name=ADAPTER)
            # TRL trains UNets only, and files of adapters for transformers have peft's names
            if family.network == "unet":
                state = _in_one_naming(state)
            # safetensors refuses tensors that are not contiguous, such as those in the channels_last layout
            written[f"{name}_lora_layers"] = {key: value.contiguous() for key, value in state.items()}
            written[f"{name}_lora_adapter_metadata"] = _with_sorted_sets(part.peft_config[ADAPTER].to_dict())
    family.pipe.save_lora_weights(save_directory=output_dir, **written)
    _sort_metadata(Path(output_dir) / LORA_WEIGHTS)


def check_kohya(network: str, is_lora: bool) -> None:
    """Raises `ValueError` for a run whose model does not come in kohya's layout."""
    if not is_lora:
        raise ValueError("kohya_lora is True, and the run trains all weights and no LoRA: leave it out")
    if network != "unet":
        raise ValueError(
            f"kohya_lora is for UNets, and the model has a {network}, whose {LORA_WEIGHTS} ComfyUI reads: leave it out"
        )


def save_kohya(family: Family, path: Path) -> None:
    """Writes the trained adapter in kohya's layout: `lora_unet_<layer>.lora_down`, `.lora_up` and `.alpha`.

    An adapter adds `alpha / rank * up @ down` to a layer, and the alpha of every layer is written. Raises `ValueError`
    for a model whose adapters do not come in this layout.
    """
    check_kohya(family.network, is_lora=True)
    kept: dict[str, torch.Tensor] = {}
    for name, prefix in KOHYA_PREFIXES.items():
        part = family.pipe_part(name)
        if ADAPTER not in getattr(part, "peft_config", {}):
            continue
        state = get_peft_model_state_dict(part, adapter_name=ADAPTER)
        kept |= convert_state_dict_to_kohya({f"{name}.{key}": value for key, value in state.items()})
        for layer_name, layer in _adapted_layers(part):
            # the converter takes the rank for alpha
            if ADAPTER in layer.lora_A:
                alpha = layer.scaling[ADAPTER] * layer.r[ADAPTER]
                kept[f"{prefix}_{layer_name.replace('.', '_')}.alpha"] = torch.tensor(float(alpha))
    if "text_encoder_2" not in family.text_encoders:
        kept = {key.replace("lora_te1_", "lora_te_"): value for key, value in kept.items()}
    tensors = {key: value.detach().cpu().contiguous() for key, value in kept.items()}
    save_file(tensors, path, metadata={"format": "pt", "ss_network_module": "networks.lora"})
    _sort_metadata(path)


def _in_one_naming(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames an adapter's weights from peft's names to TRL's, if all of them have one.

    TRL's naming covers layers of attention only, and diffusers cannot read a file with both namings.
    """
    renamed = convert_state_dict_to_diffusers(state)
    return state if any(".lora_A." in name for name in renamed) else renamed


def _with_sorted_sets(settings: dict[str, Any]) -> dict[str, Any]:
    """Replaces sets by sorted lists: the order of a set of strings differs between processes."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def _sort_metadata(path: Path) -> None:
    """Rewrites a safetensors file with its metadata in order, so that equal adapters make equal files.

    safetensors keeps the metadata in a hash map, whose order differs between processes. The file begins with the length
    of its header in 8 bytes, little-endian; the header is JSON, and the tensors' offsets in it count from its end.
    """
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # the weights begin at a multiple of eight bytes
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def read_adapter(family: Family, network: Any, path: Path) -> None:
    """Reads the network's part of a file of `save_adapter` into the network's trained adapter.

    Raises `ValueError` if the file's adapter has other layers or settings.
    """
    prefix = f"{family.network}."
    _check_same_settings(network.peft_config[ADAPTER], path, prefix)
    state = {name.removeprefix(prefix): v for name, v in load_file(path).items() if not name.startswith("text_encoder")}
    problems = set_peft_model_state_dict(network, convert_unet_state_dict_to_peft(state), adapter_name=ADAPTER)
    if problems is not None and problems.unexpected_keys:
        raise ValueError(f"{path.parent} holds another adapter: unexpected {problems.unexpected_keys[0]}")


def _check_same_settings(mine: LoraConfig, path: Path, prefix: str) -> None:
    """Raises `ValueError` if a file's adapter has other `SCALE_SETTINGS` than the adapter it is read into."""
    with safe_open(path, "pt") as file:
        saved = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    for name in SCALE_SETTINGS:
        was, now = saved.get(prefix + name), getattr(mine, name)
        if was is not None and was != now:
            raise ValueError(
                f"{path.parent} holds another adapter: its {name} is {was}, and this run's is {now}: give {was} again"
            )
