"""LoRA adapters: the one that is trained, the one that lies beside a model, and others that stay as they are."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from huggingface_hub import _CACHED_NO_EXIST, constants, errors, hf_hub_download, try_to_load_from_cache
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ddpo_fast.model_configs import first_line, hub_problem, model_folder, pickle_problem

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
ADAPTER = "default"
TRL_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
TRL_RANK = 4
# what says how strong an adapter is, beside its weights
SCALE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
FUSE = "pipe.fuse_lora(); pipe.unload_lora_weights(); pipe.save_pretrained(new_folder)"


def find_adapter(name: str, revision: str = "main") -> Path | None:
    """The file of the adapter beside a model, or None where there surely is none.

    Raises `OSError` where the Hub cannot say whether there is one, `ValueError` for one that is a pickle.
    """
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
    """Whether the cache remembers that the Hub has no adapter for a model."""
    if try_to_load_from_cache(name, LORA_WEIGHTS, revision=revision) is _CACHED_NO_EXIST:
        return True
    # of huggingface_hub 2
    list_cached = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if list_cached is None:
        return False
    try:
        return LORA_WEIGHTS not in {file.path for file in list_cached(name, revision=revision)}
    except errors.CachedRepoTreeNotFoundError:
        return False


def load_adapter(pipe: Any, path: Path) -> None:
    """Loads an adapter's file, with its text encoder's part if it has one, as the one that is trained.

    Raises `OSError` for a file that cannot be read, or that is for another kind of model.
    """
    try:
        state, alphas, metadata = pipe.lora_state_dict(
            str(path.parent), weight_name=path.name, use_safetensors=True, return_lora_metadata=True
        )
        common = {"network_alphas": alphas, "adapter_name": ADAPTER, "metadata": metadata, "_pipeline": pipe}
        pipe.load_lora_into_unet(state, unet=pipe.unet, **common)
        # it warns of an adapter without such a part
        if not all(map(_is_of_unet, state)):
            pipe.load_lora_into_text_encoder(state, text_encoder=pipe.text_encoder, **common)
        if not any(ADAPTER in getattr(part, "peft_config", {}) for part in (pipe.unet, pipe.text_encoder)):
            raise ValueError(f"nothing in it is for this kind of model (it has {next(iter(state), 'nothing')!r})")
    except Exception as error:
        raise OSError(
            f"the adapter {path} cannot be loaded by diffusers: {first_line(error)}; copy it again if it is damaged, "
            "or move it away for a new one"
        ) from error


def check_options(unet: Any, path: Path, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Raises `ValueError` for options that are neither TRL's defaults nor those of the adapter that was loaded."""
    loaded = unet.peft_config[ADAPTER]
    adapted = {name for name, layer in _layers(unet) if ADAPTER in layer.lora_A or ADAPTER in layer.lora_embedding_A}
    same_layers = set(targets) == set(TRL_TARGETS) or set(find_targets(unet, targets)) == adapted
    for name, given, real, fits in (
        ("lora_rank", rank, loaded.r, rank in (TRL_RANK, loaded.r)),
        ("lora_alpha", alpha, loaded.lora_alpha, alpha in (TRL_RANK, loaded.lora_alpha)),
        ("lora_target_modules", ",".join(targets), ",".join(sorted(loaded.target_modules)), same_layers),
    ):
        if not fits:
            raise ValueError(
                f"{name} is {given}, and the adapter {path} that training goes on with has {real}: leave {name} out, "
                f"or make one model of both first ({FUSE})"
            )


def find_targets(unet: nn.Module, targets: Sequence[str]) -> list[str]:
    """The layers of a UNet that LoRA's target modules mean. Raises `ValueError` for one that means none."""
    names = {name.replace(".base_layer", ""): layer for name, layer in unet.named_modules() if "lora_" not in name}
    found = []
    for target in targets:
        meant = [name for name in names if name == target or name.endswith(f".{target}")]
        if not meant:
            raise ValueError(
                f"lora_target_modules names {target!r}, and the UNet has no such layer: name some of it, as to_q, "
                "to_k, to_v, to_out.0, proj_in, ff.net.2 or conv1"
            )
        for name in meant:
            if not isinstance(names[name], nn.Linear | nn.Conv2d | BaseTunerLayer):
                raise ValueError(
                    f"lora_target_modules names {target!r}, a {type(names[name]).__name__}, and an adapter goes on "
                    "linear and convolution layers: name those in it"
                )
        found += meant
    if not found:
        raise ValueError("lora_target_modules names no layer: leave it out for TRL's")
    return found


def check_new(unet: nn.Module, config: LoraConfig) -> None:
    """Raises `ValueError` for an adapter that a UNet cannot have."""
    layers: dict[str, Any] = dict(unet.named_modules())
    sizes: list[int] = []
    for name in find_targets(unet, list(config.target_modules or ())):
        layer = layers[name]
        base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        sizes.append(min(base.weight.shape[0], base.weight[0].numel()))
    if config.r > max(sizes):
        raise ValueError(
            f"lora_rank is {config.r}, and the largest layer to be adapted has rank {max(sizes)}: choose at most that"
        )


def add_adapter(unet: Any, config: LoraConfig) -> None:
    """Makes the adapter that is trained, if it is not there, and trains it alone.

    Others that are active stay so and are frozen. Raises `ValueError` for others that were merged into the weights but
    not unloaded, as a layer then passes the trained one over.
    """
    before = [layer for _, layer in _layers(unet)]
    if any(layer.merged for layer in before):
        raise ValueError(
            "a LoRA was fused into the UNet and not unloaded: call pipeline.sd_pipeline.unload_lora_weights()"
        )
    active = [name for layer in before[:1] if not layer.disable_adapters for name in layer.active_adapters]
    if ADAPTER not in getattr(unet, "peft_config", {}):
        with warnings.catch_warnings():
            # that there are others, which the user knows
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            unet.add_adapter(config, ADAPTER)
    for _, layer in _layers(unet):
        layer.enable_adapters(True)
        layer.set_adapter([*(name for name in active if name != ADAPTER), ADAPTER])
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora_" in name and ADAPTER in name.split("."))


def check_none(unet: Any) -> None:
    """Raises `ValueError` for a UNet with an adapter, where all its weights are to be trained."""
    if any(True for _ in _layers(unet)):
        raise ValueError(
            "a LoRA is loaded in the UNet, and use_lora is False: fuse it first, with "
            "pipeline.sd_pipeline.fuse_lora(); pipeline.sd_pipeline.unload_lora_weights(), or train with use_lora=True"
        )


def _layers(network: nn.Module) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]


def has_adapter(network: nn.Module) -> bool:
    """Whether any adapter is loaded in a network."""
    return bool(_layers(network))


def without_adapter(network: Any) -> Any:
    """A network that shares the weights below the trained adapter and has its class's own parameter names.

    Other active adapters are added to the weights.
    """
    with torch.device("meta"):
        made = type(network).from_config if hasattr(network, "from_config") else type(network)
        plain = made(network.config)
    weights = {name.replace(".base_layer", ""): p for name, p in network.state_dict().items() if "lora_" not in name}
    for name, layer in _layers(network):
        others = [other for other in layer.active_adapters if other != ADAPTER]
        if others and not layer.disable_adapters:
            fused = copy.deepcopy(layer)
            fused.merge(adapter_names=others)
            weights |= {f"{name}.{key}": value for key, value in fused.get_base_layer().state_dict().items()}
    plain.load_state_dict(weights, assign=True)
    return plain


def save_adapter(pipe: Any, unet: Any, output_dir: str | Path) -> None:
    """Writes the trained adapter, and the text encoder's part that came with it, as `LORA_WEIGHTS`."""
    written: dict[str, Any] = {}
    for name, network in (("unet", unet), ("text_encoder", pipe.text_encoder)):
        if ADAPTER in getattr(network, "peft_config", {}):
            state = _named_alike(get_peft_model_state_dict(network, adapter_name=ADAPTER))
            # safetensors takes no weights that lie with their channels last
            written[f"{name}_lora_layers"] = {key: value.contiguous() for key, value in state.items()}
            written[f"{name}_lora_adapter_metadata"] = _in_order(network.peft_config[ADAPTER].to_dict())
    pipe.save_lora_weights(save_directory=output_dir, **written)
    _sort_metadata(Path(output_dir) / LORA_WEIGHTS)


def _named_alike(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by TRL's names, or all by peft's, which layers outside attention have: diffusers reads no mixture."""
    renamed = convert_state_dict_to_diffusers(state)
    return state if any(".lora_A." in name for name in renamed) else renamed


def _in_order(settings: dict[str, Any]) -> dict[str, Any]:
    """Sets as sorted lists, so that equal adapters make equal files."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def _sort_metadata(path: Path) -> None:
    """Safetensors writes its metadata in an order that is another in each process."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # the weights begin at a multiple of eight bytes
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def read_adapter(unet: Any, path: Path) -> None:
    """Reads the UNet's part of what `save_adapter` wrote into the adapter that is there."""
    _check_same_shape(unet.peft_config[ADAPTER], path)
    state = {name.removeprefix("unet."): value for name, value in load_file(path).items() if _is_of_unet(name)}
    problems = set_peft_model_state_dict(unet, convert_unet_state_dict_to_peft(state), adapter_name=ADAPTER)
    if problems is not None and problems.unexpected_keys:
        raise ValueError(f"{path.parent} holds another adapter: unexpected {problems.unexpected_keys[0]}")


def _check_same_shape(mine: LoraConfig, path: Path) -> None:
    """Raises `ValueError` where a file's adapter has another scale than the one that its weights are read into."""
    with safe_open(path, "pt") as file:
        saved = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    for name in SCALE:
        was, now = saved.get(f"unet.{name}"), getattr(mine, name)
        if was is not None and was != now:
            raise ValueError(
                f"{path.parent} holds another adapter: its {name} is {was}, and this run's is {now}: give {was} again"
            )


def _is_of_unet(name: str) -> bool:
    return not name.startswith("text_encoder.")
