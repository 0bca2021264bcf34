"""What the settings of a run must be: each field's type and range, and the rules across fields.

A field with a list of choices, or one that is True or False, needs no rule here: the rule follows from the field.
Every other field is in `RULES`, and combinations that are not allowed are in `CONFLICTS`. A rule is a predicate, with
words for the message that say what the value must be.
"""

from __future__ import annotations

import itertools
import json
import numbers
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

# a `DDPOConfig`, whose module imports this one
Settings: TypeAlias = Any
Predicate: TypeAlias = Callable[[Any], bool]

# a batch or a buffer above this is a typing mistake
MAX_SIZE = 10**6
# no layer of these models is wider: GEGLU projects 1280 channels to 8 * 1280
MAX_LORA_RANK = 10240
# 'auto' is the first that a model has, see `Family.samplers`
SAMPLERS = ("auto", "ddim", "flow_sde", "flow_ddim", "cps", "dance")
# trackers that can be chosen by name, as accelerate calls them, with the packages of which one must be installed
TRACKER_PACKAGES = {
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "comet_ml": ("comet_ml",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "aim": ("aim",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
}


def plain(value: Any) -> Any:
    """`value` with a path as a string and a NumPy scalar as a Python number: config.json keeps the settings as JSON."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") and not value.shape else value


def shown(value: Any) -> str:
    """A value's `repr` on one line and of at most 200 characters, for a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text:.197}..."


def one_of(choices: Collection[Any]) -> str:
    """The choices in words: "'a', 'b' or 'c'"."""
    *first, last = map(repr, choices)
    return f"{', '.join(first)} or {last}" if first else last


def broken_rule(config: Settings) -> str:
    """The first field that breaks its rule, in one sentence, or ''."""
    for name, fits, demand in _rules(config):
        value = getattr(config, name)
        try:
            is_fine = bool(fits(value))
        # arrays compare to arrays, and some objects refuse to be compared or to be converted to a number
        except (TypeError, ValueError, ArithmeticError):
            is_fine = False
        if not is_fine:
            return f"{name} is {shown(value)} but must be {demand}"
    return ""


def _rules(config: Settings) -> Iterator[tuple[str, Predicate, str]]:
    """Each field's name, predicate and demand: from `RULES`, else from the field's choices or its default."""
    for option in fields(config):
        choices = option.metadata.get("choices")
        if option.name in _RULE_OF:
            yield option.name, *_RULE_OF[option.name]
        elif choices:
            yield option.name, choices.__contains__, one_of(choices)
        elif isinstance(option.default, bool):
            yield option.name, lambda value: isinstance(value, bool), "True or False"


def whole(least: int, most: float = float("inf")) -> Predicate:
    # True and False are whole numbers to Python
    return lambda v: isinstance(v, numbers.Integral) and not isinstance(v, bool) and least <= int(v) <= most


def _number(fits: Callable[[float], bool]) -> Predicate:
    """A finite number, not a bool, for which `fits` is true. NaN is refused, as it is not below infinity."""
    return lambda value: (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and abs(float(value)) < float("inf")
        and fits(float(value))
    )


def _none_or(fits: Predicate) -> Predicate:
    return lambda value: value is None or fits(value)


def is_path(value: Any) -> bool:
    # no file system takes a NUL
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        Path(value).expanduser()
    # '~name' where this machine has no such user
    except RuntimeError:
        return False
    return True


def _is_tracker(value: Any) -> bool:
    """A tracker's name, accelerate's 'all', or an object or a list of objects, which accelerate checks itself."""
    return not isinstance(value, (str, bool, int, float)) or value in (*TRACKER_PACKAGES, "all")


def pixels(size: Any) -> tuple[int, int]:
    """(height, width) of a size as in '512x768', or of a pair. Raises `ValueError` or `TypeError` for others."""
    height, width = map(int, size.split("x")) if isinstance(size, str) else size
    return height, width


def _are_sizes(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    return is_list and all(map(whole(1, MAX_SIZE), itertools.chain.from_iterable(map(pixels, value))))


def _is_window(value: Any) -> bool:
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(whole(0), value))
    return is_pair and value[0] <= value[1]


# (fields, predicate, what the value must be); NaN fails every comparison
RULES: tuple[tuple[str, Predicate, str], ...] = (
    ("seed", whole(0, 2**32 - 1), f"a whole number from 0 to {2**32 - 1}, as NumPy's generator takes no larger seed"),
    ("num_epochs", whole(0, 10**9), f"a whole number from 0 to {10**9}"),
    (
        "train_warmup_steps train_target_decay train_min_8bit_size sample_redraws early_stopping_patience "
        "keep_checkpoint_every sample_freq",
        whole(0),
        "a whole number of at least 0",
    ),
    ("zero", whole(0, 3), "0, 1, 2 or 3"),
    ("ema_decay train_skip_last_steps", _number(lambda v: 0 <= v < 1), "at least 0 and below 1"),
    ("train_strongest_share", _number(lambda v: 0 < v <= 1), "above 0 and at most 1"),
    ("rwr_top_fraction", _number(lambda v: 0 <= v <= 1), "from 0 to 1"),
    ("cuda_graphs", _none_or(lambda v: isinstance(v, bool)), "None, True or False"),
    ("gpu_memory", _none_or(_number(lambda v: v > 0)), "None or a number above 0 (GB)"),
    ("deepspeed", _none_or(lambda v: v != "" and is_path(v)), "None or the path of a JSON file"),
    ("output_dir", _none_or(is_path), "None or the path of a folder"),
    ("hub_model_id", _none_or(lambda v: isinstance(v, str) and v != ""), "None or a name, owner/name"),
    ("logdir resume_from", is_path, "a string, the path of a folder"),
    ("run_name exp_name", is_path, "a string that can name a folder"),
    ("save_freq num_checkpoint_limit eval_freq", whole(1), "a whole number of at least 1"),
    (
        "sample_num_steps sample_batch_size sample_num_batches_per_epoch train_batch_size "
        "train_gradient_accumulation_steps train_num_inner_epochs max_workers per_prompt_stat_tracking_buffer_size "
        "per_prompt_stat_tracking_min_count sample_group_size train_pool_latents eval_num_images "
        "sample_num_images",
        whole(1, MAX_SIZE),
        f"a whole number from 1 to {MAX_SIZE}",
    ),
    (
        "train_micro_batch_size sample_merge_batches",
        _none_or(whole(1, MAX_SIZE)),
        f"None or a whole number from 1 to {MAX_SIZE}",
    ),
    (
        "sample_eta",
        _number(lambda v: 0 < v <= 1),
        "above 0 and at most 1 (at 0 the sampler is deterministic and has no log-probs to train on)",
    ),
    ("height width", _none_or(whole(1, MAX_SIZE)), "None or a whole number of pixels above 0"),
    ("sizes", _none_or(_are_sizes), "None or sizes in pixels, each height x width, as in 512x512 512x768"),
    ("sde_window", _none_or(_is_window), "None or two whole numbers, the first step with noise and the last"),
    ("train_timestep_fraction", _number(lambda v: 0 < v <= 1), "above 0 and at most 1"),
    ("train_adam_beta1 train_adam_beta2", _number(lambda v: 0 <= v < 1), "at least 0 and below 1"),
    (
        "train_learning_rate train_adam_weight_decay sample_guidance_scale train_target_update train_kl_weight "
        "rwr_beta spatial_credit",
        _number(lambda v: v >= 0),
        "a number of at least 0",
    ),
    ("train_adam_epsilon train_adv_clip_max train_clip_range", _number(lambda v: v > 0), "a number above 0"),
    (
        "train_max_grad_norm",
        lambda v: v == float("inf") or _number(lambda norm: norm > 0)(v),
        "a number above 0, or inf to leave gradients as they are",
    ),
    ("log_with", _is_tracker, one_of((None, *TRACKER_PACKAGES))),
    ("tracker_project_name", lambda v: isinstance(v, str), "a string"),
    # `encode` raises for a lone surrogate, which no tokenizer takes
    (
        "negative_prompts",
        _none_or(lambda v: isinstance(v, str) and v.encode() is not None),
        "a string, or strings that commas then separate",
    ),
)
_RULE_OF = {name: (fits, demand) for names, fits, demand in RULES for name in names.split()}


# combinations of settings that are not allowed: a predicate, and the message with the remedy
CONFLICTS: tuple[tuple[Callable[[Settings], bool], str], ...] = (
    (
        lambda c: c.zero > 0 and c.deepspeed is not None,
        "zero and deepspeed are both set: the file says which stage it wants, leave out zero",
    ),
    (
        lambda c: c.offload != "none" and c.uses_deepspeed and not c.zero,
        "offload is set beside settings of DeepSpeed's own: ask for offload_optimizer in the file, or in accelerate's "
        "config",
    ),
    (lambda c: c.offload == "all" and c.zero != 3, "offload is 'all', which needs zero=3: use 'optimizer'"),
    (
        lambda c: c.train_paged_adam and not c.train_use_8bit_adam,
        "train_paged_adam is True, which needs train_use_8bit_adam: set that too",
    ),
    (
        lambda c: c.train_paged_adam and (c.offload != "none" or c.uses_deepspeed),
        "train_paged_adam is True, but offload or ZeRO decide where states are: leave it out",
    ),
    (
        lambda c: c.stochastic_rounding and (c.mixed_precision != "bf16" or c.offload != "none" or c.uses_deepspeed),
        "stochastic_rounding is True, which needs mixed_precision='bf16' without offload and ZeRO",
    ),
    (
        lambda c: c.optimizer_in_backward and c.train_max_grad_norm != float("inf"),
        "optimizer_in_backward is True, and a norm is known only after the backward pass: set train_max_grad_norm=inf",
    ),
    (
        lambda c: (
            c.optimizer_in_backward
            and (c.mixed_precision == "fp16" or c.offload != "none" or c.uses_deepspeed or c.cuda_graphs)
        ),
        "optimizer_in_backward is True, which needs mixed_precision 'bf16' or 'no' without offload, ZeRO and "
        "cuda_graphs",
    ),
    (
        lambda c: c.sizes is not None and (c.height is not None or c.width is not None),
        "sizes and height or width are both set: leave out height and width",
    ),
    (
        lambda c: c.sizes is not None and (c.cuda_graphs or c.compile_unet),
        "cuda_graphs and compile_unet are made for images of one size, and sizes is set: leave them out",
    ),
    (
        lambda c: c.sample_group_size > 1 and c.per_prompt_stat_tracking,
        "sample_group_size is above 1, and per_prompt_stat_tracking is True: both say what a reward is compared with, "
        "leave one out",
    ),
    (
        lambda c: c.sample_group_noise == "shared" and c.sample_group_size == 1,
        "sample_group_noise is 'shared', which needs groups: set sample_group_size above 1",
    ),
    (
        lambda c: c.sample_redraws > 0 and c.sample_group_size == 1,
        "sample_redraws is above 0, which needs groups to draw again: set sample_group_size above 1",
    ),
    (
        lambda c: c.train_image_credit != "none" and c.objective == "rwr",
        "train_image_credit shares an image's advantage among its steps, but objective 'rwr' weighs whole images: use "
        "train_image_credit='none'",
    ),
    (
        lambda c: c.train_image_credit == "value" and c.train_advantages != "std",
        "train_image_credit is 'value', which foretells rewards and not their ranks: leave out train_advantages",
    ),
    (
        lambda c: c.train_image_credit == "coca" and c.sde_window is not None,
        "train_image_credit is 'coca', which compares the predictions of all steps with noise: leave out sde_window",
    ),
    (
        lambda c: bool(c.negative_prompts) and not c.guides_by_rows,
        "negative_prompts is set, but the model takes guidance as an input and no negative prompt: leave it out",
    ),
    (
        lambda c: c.is_flow_matching and (c.train_image_credit == "coca" or c.objective == "rwr"),
        "train_image_credit='coca' and objective='rwr' are made for diffusion's noise, and the model is of flow "
        "matching: leave them out",
    ),
    (
        lambda c: c.objective == "rwr" and c.sde_window is not None,
        "objective is 'rwr', which trains on noised images and on no denoising steps: leave out sde_window",
    ),
    (
        lambda c: c.uses_deepspeed and (c.cuda_graphs or c.compile_unet or c.quantize_frozen != "none"),
        "cuda_graphs, compile_unet and quantize_frozen do not work with ZeRO: leave them out",
    ),
    (
        lambda c: c.compile_unet and c.quantize_frozen != "none",
        "compile_unet is True, and quantize_frozen has layers that the compiler cannot read: leave out one of them",
    ),
    (
        lambda c: c.ema_sampling and not c.ema_decay,
        "ema_sampling is True, which needs a moving average of the weights: set ema_decay (0.99, for instance)",
    ),
    (
        lambda c: c.uses_deepspeed and (c.ema_sampling or c.train_kl_weight > 0),
        "ema_sampling and train_kl_weight exchange whole weights, which ZeRO splits among processes: leave them out, "
        "or train without ZeRO",
    ),
    (
        lambda c: c.objective == "ddpo_sf" and (c.ema_sampling or c.train_recompute_log_probs),
        "objective is 'ddpo_sf', which holds for samples of the trained weights and reads no log-probs of the sampler: "
        "leave out ema_sampling and train_recompute_log_probs, or use objective='ddpo_is'",
    ),
    (
        lambda c: c.objective != "ddpo_is" and c.train_clip_unit != "ratio",
        "train_clip_unit is for objective='ddpo_is', the only one that clips: leave it out",
    ),
    (
        lambda c: c.objective == "rwr" and (c.per_prompt_stat_tracking or c.train_advantages != "std"),
        "objective is 'rwr', which weighs images by their rewards and has no advantages: leave out "
        "per_prompt_stat_tracking and train_advantages, or set rwr_per_prompt",
    ),
    (
        lambda c: c.objective == "rwr" and c.sample_group_size > 1 and not c.rwr_per_prompt,
        "sample_group_size compares the images of a group with each other, and objective='rwr' all images: set "
        "rwr_per_prompt, or leave out sample_group_size",
    ),
    (
        lambda c: (
            c.objective == "rwr"
            and (
                c.step_credit != "none"
                or c.train_image_credit != "none"
                or c.train_skip_last_steps > 0
                or c.train_strongest_share < 1
                or c.train_pool_latents > 1
            )
        ),
        "objective is 'rwr', which trains on noised images and on no denoising steps: leave out step_credit, "
        "train_image_credit, train_skip_last_steps, train_strongest_share and train_pool_latents",
    ),
    (
        lambda c: c.train_target_decay > 0 and c.train_target_update == 0,
        "train_target_decay is above 0, which needs train_target_update: set that too",
    ),
    (
        lambda c: c.objective == "rwr" and (c.train_kl_weight > 0 or c.train_recompute_log_probs),
        "objective is 'rwr', which knows no log-probs: leave out train_kl_weight and train_recompute_log_probs",
    ),
    (
        lambda c: c.objective != "rwr" and (c.rwr_beta != 0.2 or c.rwr_top_fraction > 0 or c.rwr_per_prompt),
        "rwr_beta, rwr_top_fraction and rwr_per_prompt are for objective='rwr': set that, or leave them out",
    ),
    (
        lambda c: c.rwr_top_fraction > 0 and c.rwr_beta != 0.2,
        "rwr_top_fraction gives all images that it keeps the same weight: leave out rwr_beta",
    ),
)


def conflict(settings: Settings) -> str:
    """The message of the first of `CONFLICTS` that settings have, or ''."""
    return next((problem for applies, problem in CONFLICTS if applies(settings)), "")


def parsed_mapping(name: str, value: Any) -> dict[str, Any]:
    """The mapping that field `name` was given: a dict, None for an empty one, or a string with a JSON object.

    Raises `ValueError` for anything else.
    """
    mapping = value
    if isinstance(value, str):
        try:
            mapping = json.loads(value or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is {shown(value)} but must be a JSON object: {error}") from None
    if not isinstance(mapping, (dict, type(None))):
        raise ValueError(f"{name} is {shown(value)} but must be a dict, or a JSON object")
    return mapping or {}
