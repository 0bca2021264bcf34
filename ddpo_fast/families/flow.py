"""What the families of flow matching share: a transformer, numbered steps, and samplers whose noise is added to an ODE.

A key is the number of a step, from 0. The last step has no noise, and neither have those outside a window.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpo_fast.families.base import Config, Family, Prompts, with_pooled, without_pooled
from ddpo_fast.flow_matching import dynamic_shift, flow_predictions, flow_scheduler, flow_table, noise_levels
from ddpo_fast.step_table import Prediction

# The level of noise that each sampler is published with. TRL's default of `sample_eta`, 1.0, stands for it.
USUAL_LEVELS = {"flow_sde": 0.7, "cps": 0.8, "dance": 0.3, "flow_ddim": 1.0}


class FlowMatching(Family):
    network = "transformer"
    samplers = tuple(USUAL_LEVELS)
    last_step_has_noise = False
    is_flow_matching = True
    unloaded = {"feature_extractor": None, "image_encoder": None}

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        # All are shared by the copies of `at`, which share the scheduler: its noise levels as it had them last, with
        # the number of image tokens that they are for, and the tables and timesteps that were made.
        self._set: dict[str, Any] = {}
        self._tables: dict[tuple[Any, ...], Tensor] = {}
        self._kept_timesteps: dict[tuple[Any, ...], Tensor] = {}

    # told from configs

    @classmethod
    def patch(cls, configs: Mapping[str, Config]) -> int:
        """Latent pixels that make a token of the transformer, in each direction."""
        return 2

    @classmethod
    def divisor(cls, configs: Mapping[str, Config]) -> int:
        return max(8, cls.patch(configs) * cls.vae_scale(configs))

    @classmethod
    def dtype_of(cls, part: str, config: Config, dtype: torch.dtype) -> torch.dtype:
        # T5's activations leave the range of fp16, and so do those of VAEs that say so
        if dtype == torch.float16 and getattr(config, "model_type", "") == "t5":
            return torch.bfloat16
        upcast = part == "vae" and config.get("force_upcast")
        return torch.float32 if dtype == torch.float16 and upcast else dtype

    @classmethod
    def make_scheduler(cls, config: Config) -> Any:
        return flow_scheduler(config)

    @classmethod
    def check_steps(cls, scheduler: Any, steps: int, level: float) -> None:
        trial = copy.copy(scheduler)
        cls._set_levels(trial, steps, "cpu", tokens=256)
        noise_levels(trial)

    @classmethod
    def first_levels(cls, steps: int) -> Any:
        """u of flow_matching.py for the scheduler's `set_timesteps`, or None for its own."""
        return None

    @classmethod
    def _set_levels(cls, scheduler: Any, steps: int, device: torch.device | str, tokens: int) -> None:
        given: dict[str, Any] = {}
        if scheduler.config.use_dynamic_shifting:
            given["mu"] = dynamic_shift(scheduler.config, tokens)
        scheduler.set_timesteps(steps, device=device, sigmas=cls.first_levels(steps), **given)

    # steps

    @property
    def image_tokens(self) -> int:
        _, height, width = self.latent_shape
        patch = self.patch(self.parts_configs())
        return (height // patch) * (width // patch)

    def set_steps(self, steps: int, device: torch.device | str) -> None:
        scheduler = self.pipe.scheduler
        self._set_levels(scheduler, steps, device, self.image_tokens)
        levels = noise_levels(scheduler)
        # the same tensor whenever nothing has changed: the network's call reads it, and CUDA graphs at its address
        name = tuple(levels.tolist()), scheduler.timesteps.device
        scheduler.timesteps = self._kept_timesteps.setdefault(name, scheduler.timesteps)
        self._set.update(sigmas=scheduler.sigmas, levels=levels, tokens=self.image_tokens)

    @property
    def num_steps(self) -> int | None:
        # noise levels may follow the number of tokens, and a copy for another size may have set its own
        current = self._set.get("sigmas") is self.pipe.scheduler.sigmas and self._set.get("tokens") == self.image_tokens
        return self.pipe.scheduler.num_inference_steps if current else None

    @property
    def keys(self) -> Tensor:
        timesteps = self.pipe.scheduler.timesteps
        return torch.arange(len(timesteps), device=timesteps.device)

    def steps_table(self, level: float, device: torch.device, credit: str) -> Tensor:
        level = self._noise_level(level)
        levels = self._set["levels"]
        name = tuple(levels.tolist()), self.sampler, level, str(device), credit
        if name not in self._tables:
            self._tables[name] = flow_table(levels, self.sampler, level, credit).to(device)
        return self._tables[name]

    def steps_predictions(self, level: float) -> list[Prediction]:
        return flow_predictions(self._set["levels"], self.sampler, self._noise_level(level))

    def _noise_level(self, level: float) -> float:
        return USUAL_LEVELS[self.sampler] if level == 1.0 else level

    def _timesteps(self, rows: Tensor, keys: Tensor) -> Tensor:
        """The scheduler's timesteps, 1000 s, of `rows` [R, ...]: [R] fp32."""
        return self.pipe.scheduler.timesteps.take(keys).expand(len(rows))

    # prompts

    # width of the pooled embedding
    @property
    def _pooled_width(self) -> int:
        return self.pipe.transformer.config.pooled_projection_dim

    def encode(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        ids = self.tokens(prompts).input_ids.to(device)
        with self.encoding_on(device):
            return ids, with_pooled(*self._encoded(list(prompts), device))

    def _encoded(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """(token rows [B, L, D], pooled embeddings [B, P])."""
        raise NotImplementedError

    def prepare_prompts(self, given: Prompts, device: torch.device) -> tuple[Tensor, Tensor | None]:
        if (given.prompt is None) == (given.prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        embeds = self._embeds_of(given.prompt, given.prompt_embeds, device)
        if not given.guides:
            return embeds.repeat_interleave(given.copies, dim=0), None
        texts = given.negative_prompt
        if texts is None or isinstance(texts, str):
            texts = [texts or ""] * len(embeds)
        negative = self._embeds_of(texts, given.negative_prompt_embeds, device)
        if len(negative) != len(embeds):
            raise ValueError(f"negative_prompt has {len(negative)} prompts, but prompt has {len(embeds)}")
        return embeds.repeat_interleave(given.copies, dim=0), negative.repeat_interleave(given.copies, dim=0)

    def _embeds_of(self, prompt: str | list[str] | None, embeds: Tensor | None, device: torch.device) -> Tensor:
        if embeds is not None:
            return embeds
        return self.encode([prompt] if isinstance(prompt, str) else list(prompt or ()), device)[1]

    # the network

    def conditions(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """(token rows, pooled embedding) of `encode`'s embeddings."""
        return without_pooled(embeds, self._pooled_width)

    def latents_of_vae(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return latents / config.scaling_factor + (config.shift_factor or 0.0)
