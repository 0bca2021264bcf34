"""What the trainers run: TRL's example and its variants, our techniques one by one, and the demo's settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ddpo_fast.config import DDPOConfig
from ddpo_fast.prompts import PROMPT_LISTS

Settings = dict[str, Any]
OURS, TRL = "ours", "trl"
OUR_FIELDS = {option.name for option in fields(DDPOConfig)}
# a `save_freq` at which no checkpoint is written while something is measured
NEVER = 10**9
# Figures that are equal if two trainers have trained in the same way. Only our trainer has `skipped`, the share of
# pairs that it has left out.
LEARNING_FIGURES = ("reward_mean", "approx_kl", "clipfrac", "skipped")

# the settings of the command in TRL's documentation and example script
EXAMPLE: Settings = {
    "sample_num_steps": 50,
    "sample_batch_size": 6,
    "sample_num_batches_per_epoch": 4,
    "sample_guidance_scale": 5.0,
    "train_batch_size": 3,
    "train_gradient_accumulation_steps": 1,
    "per_prompt_stat_tracking": True,
    "per_prompt_stat_tracking_buffer_size": 32,
}
TINY: Settings = {
    "sample_num_steps": 2,
    "sample_batch_size": 2,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 2,
}
# at TRL's own rate, training all weights of a random model makes the loss infinite
FULL_RATE = 1e-5
# the settings of TRL's that the demo had before there were recipes: git show af34cb4:Makefile
TRL_DEMO: Settings = {
    "mixed_precision": "no",
    "sample_num_steps": 20,
    "sample_guidance_scale": 3.0,
    "sample_batch_size": 16,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 16,
    "train_timestep_fraction": 0.5,
    "train_learning_rate": 4e-4,
    "train_adam_beta2": 0.99,
    "train_clip_range": 5e-3,
    "per_prompt_stat_tracking": True,
    "per_prompt_stat_tracking_buffer_size": 32,
    "per_prompt_stat_tracking_min_count": 2,
}


@dataclass(frozen=True)
class Contender:
    """A trainer and its settings. An optional one may fail, or take too long, without failing the benchmark."""

    name: str
    trainer: str
    use_lora: bool
    settings: Settings
    optional: bool = False

    @property
    def precision(self) -> str:
        return {"no": "fp32"}.get(self.settings["mixed_precision"], self.settings["mixed_precision"])

    @property
    def images(self) -> int:
        """Images of an epoch."""
        return self.settings["sample_batch_size"] * self.settings["sample_num_batches_per_epoch"]

    @property
    def sample_rows(self) -> int:
        """UNet rows that an epoch samples: with guidance two for each image and step."""
        guided = self.settings["sample_guidance_scale"] > 1
        return self.images * self.settings["sample_num_steps"] * (2 if guided else 1)

    @property
    def train_rows(self) -> int:
        """UNet rows that an epoch trains on, those of pairs that are skipped for their zero gradient included."""
        trained = int(self.settings["sample_num_steps"] * self.settings.get("train_timestep_fraction", 1.0))
        guided = self.settings["sample_guidance_scale"] > 1 and self.settings.get("train_cfg", True)
        return self.images * trained * (2 if guided else 1)


@dataclass(frozen=True)
class Case:
    """Contenders that do the same work, ours first, and a sentence that says what is compared with what."""

    name: str
    compared: str
    contenders: list[Contender]


@dataclass(frozen=True)
class Technique:
    """A bar of the waterfall chart: our settings that differ from those of the bar before."""

    name: str
    title: str
    settings: Settings = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """Settings that this version of the trainer does not have, for an older checkout."""
        return sorted(set(self.settings) - OUR_FIELDS)


def prompts() -> list[str]:
    return PROMPT_LISTS["animals"]


def cases(device: str, size: str, steps: int | None, ours: Settings) -> dict[str, Case]:
    """Every case by name. `steps` replaces the number of denoising steps; `ours` are more settings for our trainer."""
    example = {**EXAMPLE, "save_freq": NEVER, **(TINY if size == "tiny" else {})}
    if steps:
        example["sample_num_steps"] = steps
    found = {case.name: case for case in _cases(device, example)}
    for name, case in found.items():
        changed = [replace(c, settings={**c.settings, **ours}) if c.trainer == OURS else c for c in case.contenders]
        found[name] = replace(case, contenders=changed)
    return found


def _cases(device: str, example: Settings) -> Iterator[Case]:
    # TRL's example runs in half precision, which is slow on a CPU
    half, name = ("fp16", "lora-fp16") if device == "cuda" else ("no", "lora")
    lora, full = {**example, "mixed_precision": half}, {**example, "train_learning_rate": FULL_RATE}
    yield Case(name, "TRL's example: the same settings for both", _pair(True, lora, lora))
    single = {**full, "mixed_precision": "no"}
    yield Case("full-fp32", "all weights: the same settings for both", _pair(False, single, single))
    bf16 = {**full, "mixed_precision": "bf16"}
    note = "all weights: ours has fp32 weights and bf16 copies to compute, trl has bf16 weights and loses small updates"
    if device == "cuda":
        yield Case("full-bf16", note, _pair(False, bf16, bf16))
    else:
        contenders = [
            Contender(OURS, OURS, False, bf16),
            Contender("trl-fp32", TRL, False, single),
            Contender("trl-bf16", TRL, False, bf16, optional=True),
        ]
        yield Case("full-bf16", f"{note}; ours in bf16 is compared with trl in fp32 and in bf16", contenders)
    # at guidance 1 TRL's sampler gives the UNet twice as many text rows as latents, which is an error of shapes
    ours, theirs = {**lora, "sample_guidance_scale": 1.0}, {**lora, "sample_guidance_scale": 1.0001, "train_cfg": False}
    note = "ours at guidance 1; trl fails there, so at 1.0001 with train_cfg=False: two rows to sample, one to train"
    yield Case("no-guidance", note, _pair(True, ours, theirs))


def _pair(use_lora: bool, ours: Settings, theirs: Settings) -> list[Contender]:
    return [Contender(OURS, OURS, use_lora, ours), Contender(TRL, TRL, use_lora, theirs)]


def techniques(device: str, case: Case) -> list[Technique]:
    """The bars of a waterfall chart from left to right; each keeps the settings of those before it."""
    plain = {
        "train_micro_batch_size": case.contenders[0].settings["train_batch_size"],
        "sample_merge_batches": 1,
        "sample_cache": False,
        "fuse_unet": False,
        "train_skip_dead_pairs": False,
        "reward_overlap": False,
        "compile_unet": False,
        "cuda_graphs": False,
    }
    listed = [
        Technique("plain", "ours, plain", plain),
        Technique("merged", "+ merged sampling", {"sample_merge_batches": None}),
        Technique("cached", "+ cached embeddings", {"sample_cache": True}),
        Technique("packed", "+ packed micro-batches", {"train_micro_batch_size": None}),
        Technique("fused", "+ fused UNet", {"fuse_unet": True}),
        Technique("skipped", "+ skipped zero-gradient pairs", {"train_skip_dead_pairs": True}),
        Technique("overlapped", "+ reward overlap", {"reward_overlap": True}),
    ]
    if case.contenders[1].precision == "fp32":
        half = "fp16" if device == "cuda" else "bf16"
        listed.append(Technique("half", f"+ {half}", {"mixed_precision": half}))
    listed.append(Technique("compiled", "+ torch.compile", {"compile_unet": True}))
    if device == "cuda":
        listed.append(Technique("graphs", "+ CUDA graphs", {"cuda_graphs": True}))
    return listed
