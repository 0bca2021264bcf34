"""Makes DeepSpeed's settings from DDPOConfig and from a file in DeepSpeed's format, and starts its process group."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from ddpo_fast.config import DDPOConfig
from ddpo_fast.config_rules import shown
from ddpo_fast.engine.loss_scale import GROWTH_INTERVAL, INITIAL_SCALE
from ddpo_fast.engine.optimizers import BUCKET

# Stage 3's step copies the gradients of one group of tensors after the other. A process's parts of the tensors of a
# group have this many elements; by default DeepSpeed's groups have a thousand million.
SUB_GROUP = 4 * BUCKET


def zero_settings(config: DDPOConfig, precision: str, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """DeepSpeed's settings: from the file `config.deepspeed`, or for stage `config.zero`, completed with the run's own.

    Args:
        precision: 'no', 'fp16' or 'bf16'.
        given: settings from `accelerate launch`, in place of the file's.

    Raises `ValueError` for a file that cannot be read, has a wrong form, or contradicts other settings.
    """
    if precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("mixed_precision is 'fp16', which DeepSpeed does not have on a CPU: use 'bf16' or 'no'")
    read = _read(config.deepspeed) if config.deepspeed else {"zero_optimization": _stage(config)}
    settings = dict(given or read)
    # where the settings come from, for messages
    source = f"deepspeed is {config.deepspeed!r}, which" if given is None else "accelerate's configuration of DeepSpeed"
    _check_shape(settings, source)
    ours: dict[str, Any] = {
        # The engine accumulates gradients itself and weights each loss by its share of the update. With these two
        # values DeepSpeed counts one micro-batch per update and does not divide the loss.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train_max_grad_norm,
        # the number of steps between DeepSpeed's progress messages: never in practice
        "steps_per_print": 10**9,
        # without these two settings DeepSpeed accepts only optimizers that it knows, and for offload only its own
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for name, dtype in (("fp16", "fp16"), ("bf16", "bf16")):
        enabled = precision == dtype
        asked = settings.get(name, {}).get("enabled", "auto")
        if asked not in ("auto", enabled):
            raise ValueError(
                f"{source} has {name} enabled={asked}, but mixed_precision is {precision!r}: make them agree, or leave "
                f"{name} out there"
            )
        # The same loss scale as in the local engine. With a hysteresis of 1 DeepSpeed lowers the scale at the first
        # overflow; with its default of 2 it would wait for the second.
        power = int(math.log2(INITIAL_SCALE))
        scale = {"initial_scale_power": power, "loss_scale_window": GROWTH_INTERVAL, "hysteresis": 1}
        ours[name] = {**(scale if name == "fp16" else {}), **_without_auto(settings.get(name, {})), "enabled": enabled}
    if "optimizer" in settings:
        settings["optimizer"] = _filled(settings["optimizer"], config)
    settings = {**_without_auto(settings), **ours}
    # DeepSpeed computes this size from the sizes above, and refuses any other value
    settings.pop("train_batch_size", None)
    # the engine sets learning rates, which follow train_warmup_steps
    settings.pop("scheduler", None)
    # with this setting stage 3 would replace torch.nn.functional.linear in the whole process (see SplitLinear, zero.py)
    stage = settings["zero_optimization"] = {**settings["zero_optimization"], "memory_efficient_linear": False}
    devices = {stage.get(name, {}).get("device") for name in ("offload_optimizer", "offload_param")}
    if "nvme" in devices or settings.get("data_types", {}).get("grad_accum_dtype"):
        raise ValueError(
            f"{source} asks for nvme or grad_accum_dtype: offload to cpu, and say train_gradient_dtype instead"
        )
    if stage.get("stage", 0) not in (1, 2, 3):
        raise ValueError(f"{source} has no ZeRO stage of 1, 2 or 3: without one, leave DeepSpeed out")
    # From stage 2 on DeepSpeed adds up gradients, however many backward passes there are before a step.
    settings["managed_gradient_accumulation"] = stage["stage"] == 1
    if stage["stage"] > 1 and config.train_gradient_dtype == "fp32":
        settings["data_types"] = {**settings.get("data_types", {}), "grad_accum_dtype": "fp32"}
    return settings


def _filled(optimizer: dict[str, Any], config: DDPOConfig) -> dict[str, Any]:
    """The file's optimizer with DDPOConfig's values where it says 'auto'."""
    values = {
        "lr": config.train_learning_rate,
        "betas": [config.train_adam_beta1, config.train_adam_beta2],
        "eps": config.train_adam_epsilon,
        "weight_decay": config.train_adam_weight_decay,
    }
    given = optimizer.get("params", {})
    return {**optimizer, "params": {n: values.get(n, v) if v == "auto" else v for n, v in given.items()}}


def _stage(config: DDPOConfig) -> dict[str, Any]:
    """`zero_optimization` for `config.zero` and `config.offload`."""
    stage: dict[str, Any] = {
        "stage": config.zero,
        "overlap_comm": False,
        "contiguous_gradients": True,
        # DeepSpeed's defaults are for language models of many billions of weights: they would allow buffers of a
        # gigabyte, and all of a UNet's weights gathered at the same time
        "reduce_bucket_size": BUCKET,
        "sub_group_size": SUB_GROUP,
        "stage3_prefetch_bucket_size": BUCKET // 2,
        "stage3_max_live_parameters": 4 * BUCKET,
        "stage3_max_reuse_distance": 4 * BUCKET,
    }
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload != "none":
        stage["offload_optimizer"] = host
    if config.offload == "all":
        stage["offload_param"] = host
    return stage


def _read(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"deepspeed is {path!r}, which cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"deepspeed is {path!r}, which cannot be read as JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"deepspeed is {path!r}, which is not a JSON object of DeepSpeed's settings")
    return {"zero_optimization": {}, **settings}


def _check_shape(settings: dict[str, Any], source: str) -> None:
    """Raises `ValueError` for values of a wrong type, which would fail here or, much later, in DeepSpeed."""

    def check(name: str, value: Any, fits: bool, demand: str) -> None:
        if not fits:
            raise ValueError(f"{source} says that {name} is {shown(value)} but must be {demand}")

    sections = ("zero_optimization", "fp16", "bf16", "optimizer", "data_types", "activation_checkpointing")
    for name in sections:
        check(name, settings.get(name, {}), isinstance(settings.get(name, {}), dict), "an object of settings")
    stage, optimizer = settings.get("zero_optimization", {}), settings.get("optimizer")
    for name in ("offload_optimizer", "offload_param"):
        place = stage.get(name, {})
        check(name, place, isinstance(place, dict), 'an object such as {"device": "cpu"}')
        device = place.get("device", "none")
        check(f"{name}.device", device, device in ("none", "cpu", "nvme"), "'cpu' or 'none'")
    number = stage.get("stage", 0)
    check("zero_optimization.stage", number, type(number) is int, "1, 2 or 3")
    for name, value in stage.items():
        if name.endswith(("bucket_size", "max_live_parameters", "max_reuse_distance")) and value != "auto":
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
            check(f"zero_optimization.{name}", value, fits, "a number above 0, or 'auto'")
    if optimizer is not None:
        kind, params = optimizer.get("type"), optimizer.get("params", {})
        check("optimizer.type", kind, isinstance(kind, str), "an optimizer's name")
        check("optimizer.params", params, isinstance(params, dict), "an object of settings")


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that are 'auto', at any depth."""
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if value != "auto"
    }


def accelerate_settings(accelerator: Accelerator) -> dict[str, Any] | None:
    """DeepSpeed's settings that `accelerate launch` was given, or None."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else plugin.deepspeed_config


def prepare_communication(accelerator: Accelerator) -> None:
    """Gives DeepSpeed the process group that accelerate has, or one for a single process.

    On a CPU DeepSpeed's shared-memory communication is disabled, because DeepSpeed would first compile it for minutes.
    """
    import deepspeed

    # DeepSpeed reads this process's number on this machine from the environment, where launchers set it
    os.environ.setdefault("LOCAL_RANK", str(accelerator.local_process_index))
    on_cpu = accelerator.device.type == "cpu"
    if not dist.is_initialized():
        backend = "gloo" if on_cpu else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
