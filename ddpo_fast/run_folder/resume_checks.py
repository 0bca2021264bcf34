"""Whether a run can go on from a checkpoint: with the same model, and with settings that keep its curve comparable."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ddpo_fast.config import SAMPLING_FIELDS, DDPOConfig
from ddpo_fast.families import family_of_pipeline
from ddpo_fast.measured import device_name
from ddpo_fast.processes import broadcast_from_main
from ddpo_fast.quantize_frozen import QuantizedLinear
from ddpo_fast.run_folder import checkpoint

# settings that a resumed run must have unchanged
FIXED = ("pretrained_model", "pretrained_revision", "lora_rank", "lora_alpha", "lora_target_modules", "prediction_type")
# Settings whose change makes rewards incomparable with the earlier ones. A run in the same folder must have them
# unchanged; a new run in another folder may change them and start from this one's checkpoint.
SAME_CURVE = (
    "reward",
    "reward_model",
    "reward_normalize",
    "prompts",
    *SAMPLING_FIELDS,
    "per_prompt_stat_tracking",
)


def verify(resume: Path | None, accelerator: Accelerator) -> None:
    """Raises `ValueError`, on every process, for a damaged checkpoint; the main process reads it."""
    problem = ""
    if resume is not None and accelerator.is_main_process:
        try:
            checkpoint.verify(resume)
        except ValueError as error:
            problem = str(error)
    if problem := broadcast_from_main(accelerator, problem):
        raise ValueError(problem)


def refuse_changes(resume_from: str, saved: dict[str, Any], present: dict[str, Any], in_place: bool) -> None:
    """Raises `ValueError` naming the first setting in `present` with which a run of the `saved` ones cannot go on.

    Settings are compared by name, whether nested under `config` or not; one that either side lacks counts as unchanged.

    Args:
        in_place: whether the run goes on in the folder where it began, so that `SAME_CURVE` is compared too.
    """
    was, now = ({**settings.get("config", {}), **settings} for settings in (saved, present))
    same_base = "" != was.get("base", "") == now.get("base")
    for name in (*FIXED, *(SAME_CURVE if in_place else ())):
        if name not in was or name not in now or _comparable(name, was[name]) == _comparable(name, now[name]):
            continue
        if name.startswith("pretrained") and (same_base or not _is_known(was[name])):
            continue
        remedy = f"leave {name} as it was"
        if name in SAME_CURVE:
            remedy += ", or begin a new run from there with another output_dir"
        raise ValueError(f"{name} is {now[name]!r}, but the run {resume_from!r} has {was[name]!r}: {remedy}")
    if was.get("base") and now.get("base") and not same_base:
        raise ValueError(
            f"pretrained_model {now.get('pretrained_model')!r} has other weights than the one that the run "
            f"{resume_from!r} started from: give that one"
        )


def _comparable(name: str, value: Any) -> Any:
    if isinstance(value, str) and Path(value).is_absolute():
        return str(Path(value).resolve())
    # an epoch's size follows from its place
    is_set = isinstance(value, (list, tuple, set)) and name != "sizes"
    return sorted(value) if is_set else value or ""


def _is_known(model: str) -> bool:
    """Whether a recorded name identifies a model: a Hub id or an absolute path does, a relative path does not."""
    return not model.startswith(".") and (Path(model).is_absolute() or not Path(model).exists())


def base_digest(pipeline: Any) -> str:
    """A digest of the first 64 elements of each frozen tensor, which tells one base model from another.

    '' unless all frozen weights are in fp32, or as they were stored, and in host memory: a digest of rounded weights
    would not match, nor would one without those that an earlier trainer has quantized.
    """
    found = hashlib.sha256()
    stored = getattr(getattr(pipeline, "sd_pipeline", None), "stored_dtypes", {})
    family = family_of_pipeline(pipeline)
    for part in (*sorted(family.frozen), family.network):
        module = family.pipe_part(part)
        if module is None and part in family.optional:
            continue
        if not isinstance(module, torch.nn.Module):
            return ""
        if any(isinstance(layer, QuantizedLinear) for layer in module.modules()):
            return ""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                continue
            if parameter.dtype not in (torch.float32, stored.get(part)) or parameter.device.type != "cpu":
                return ""
            found.update(name.replace(".base_layer", "").encode())
            found.update(parameter.detach().flatten()[:64].float().numpy().tobytes())
    return found.hexdigest()[:16]


def run_settings(config: DDPOConfig, accelerator: Accelerator, pipeline: Any, base: str) -> dict[str, Any]:
    """What `config.json` and checkpoints record of a run's settings.

    A model's folder is recorded by its absolute path, for the run to be resumed from any working directory.

    Args:
        base: `base_digest` of the pipeline before training.
    """
    found: dict[str, Any] = {
        "config": vars(config),
        "num_processes": accelerator.num_processes,
        "device": device_name(accelerator.device),
        "base": base,
    }
    for name in ("pretrained_model", "pretrained_revision", "single_file_config", "use_lora"):
        if hasattr(pipeline, name):
            found[name] = getattr(pipeline, name)
    model = found.get("pretrained_model")
    if model and Path(model).expanduser().exists():
        found["pretrained_model"] = str(Path(model).expanduser().absolute())
    prediction = getattr(getattr(getattr(pipeline, "scheduler", None), "config", None), "prediction_type", None)
    if prediction:
        found["prediction_type"] = prediction
    if found.get("use_lora") and hasattr(pipeline, "lora_config"):
        lora = pipeline.lora_config
        found |= {
            "lora_rank": lora.r,
            "lora_alpha": lora.lora_alpha,
            "lora_target_modules": sorted(lora.target_modules),
        }
    return found
