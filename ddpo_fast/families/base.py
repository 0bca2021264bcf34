"""What the trainer needs to know of a kind of model: its parts, its prompts, its steps, and how its network is called.

Two conventions make all kinds alike to everything above:

- A timestep is a key: an int64 row number of the family's table of steps. For DDIM it is the timestep itself; a
  flow-matching family numbers its steps and looks up what the network takes.
- A prompt is one tensor [L, D]: its token rows, and for networks that also take a pooled embedding of P elements,
  ceil(P / D) rows more that hold it (`with_pooled`, `without_pooled`).

Shapes: R rows of a call of the network, B prompts, C H W latent, L tokens, D width of the text embedding, P width of
the pooled embedding, K rows of the table, T sampled steps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor, nn

from ddpo_fast.config import DDPOConfig
from ddpo_fast.offload_frozen import on_device
from ddpo_fast.step_credit import of_window
from ddpo_fast.step_table import Prediction

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Prompts:
    """What a call of the pipeline is given of its prompts: the texts, or their embeddings as `Family.encode` has them.

    Args:
        copies: images for each prompt, whose embeddings come this many times.
        guides: whether the call has rows with the negative prompt.
        lora_scale: of adapters of the text encoders; None for 1.
    """

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    copies: int = 1
    guides: bool = False
    lora_scale: float | None = None


class Family:
    """A loaded pipeline as a member of its kind, with the settings that its inputs depend on.

    Args:
        pipe: a diffusers pipeline, or a user's `DDPOStableDiffusionPipeline`, with the parts as attributes.
    """

    # of the kind, in words: for a saved model's card, and for messages
    name: ClassVar[str]
    title: ClassVar[str]
    # the beginning of the names of its recipes
    recipe: ClassVar[str]
    # diffusers' classes in `model_index.json`; the first is the one that opens a saved model
    pipelines: ClassVar[Sequence[str]]
    # the parts that a run uses, with the classes that each may have
    parts: ClassVar[Mapping[str, Sequence[str]]]
    # those of the parts that a model may lack
    optional: ClassVar[Sequence[str]] = ()
    # the trained part: attribute, folder and prefix of LoRA weights
    network: ClassVar[str] = "unet"
    # the frozen networks
    frozen: ClassVar[Sequence[str]] = ("vae", "text_encoder")
    # the layers that a new LoRA is on, unless others are named
    targets: ClassVar[Sequence[str]] = ("to_k", "to_q", "to_v", "to_out.0")
    # arguments of `from_pretrained` that leave out parts without which images are the same
    unloaded: ClassVar[dict[str, Any]] = {}
    # whether guidance takes a second row with the negative prompt; else it is an input of the network, or there is none
    guides_by_rows: ClassVar[bool] = True
    # whether the last step of the samplers has noise
    last_step_has_noise: ClassVar[bool] = True
    # whether images are mixed with noise by x = (1 - s) x_0 + s eps, and not by diffusion's forward process
    is_flow_matching: ClassVar[bool] = False
    # values of the setting `sampler`; 'auto' is the first
    samplers: ClassVar[Sequence[str]]

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.height: int | None = None
        self.width: int | None = None
        self.guidance_scale = 1.0
        self.sampler = self.samplers[0]
        self.window: tuple[int, ...] | None = None
        # tensors that the network's call reads and that depend on nothing but their name
        self.buffers: dict[tuple[Any, ...], Tensor] = {}
        self._windowed: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def use(
        self,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 1.0,
        sampler: str = "auto",
        window: Sequence[int] | None = None,
    ) -> None:
        """Sets what the network's inputs and the steps depend on.

        Args:
            height, width: of images in pixels; None for the model's own.
            guidance_scale: read by networks that take it as an input.
            sampler: one of `samplers`, or 'auto'.
            window: the first and the last step with noise, counted from 0; None for all.

        Raises `ValueError` for a size or sampler that the model does not have.
        """
        self.check_sampler(sampler)
        self.use_size(height, width)
        self.guidance_scale = guidance_scale
        self.window = None if window is None else tuple(window)
        self.sampler = self.samplers[0] if sampler == "auto" else sampler

    def use_size(self, height: int | None, width: int | None) -> None:
        """Sets the size of images in pixels, None for the model's own; raises `ValueError` for one it cannot have."""
        self.check_size(self.parts_configs(), height, width)
        self.height, self.width = height, width

    def use_settings(self, config: DDPOConfig) -> None:
        """`use` with the settings of a run. Raises `ValueError` for those that the model cannot have."""
        self.check_settings(self.parts_configs(), config)
        self.use(*config.image_sizes[0], config.sample_guidance_scale, config.sampler, config.sde_window)

    def at(self, height: int | None, width: int | None, guidance_scale: float) -> Family:
        """The same with another guidance, for images of another size; None leaves a side as it is."""
        other = copy.copy(self)
        other.use(height or self.height, width or self.width, guidance_scale, self.sampler, self.window)
        return other

    # told from configs, before any weight is read

    @classmethod
    def check(cls, configs: Mapping[str, Config]) -> None:
        """Raises `ValueError`, with the end of a sentence on the model, if its parts' configs cannot be trained."""

    @classmethod
    def make_scheduler(cls, config: Config) -> Any:
        """The scheduler that samples a model whose `scheduler_config.json` is `config`, whatever that names.

        Raises `ValueError`, with the end of a sentence on the model, for one that cannot be sampled.
        """
        raise NotImplementedError

    @classmethod
    def check_steps(cls, scheduler: Any, steps: int, level: float) -> None:
        """Raises `ValueError` if a scheduler cannot take `steps` steps with noise of `level`."""

    @classmethod
    def check_settings(cls, configs: Mapping[str, Config], config: DDPOConfig) -> None:
        """Raises `ValueError` for settings of a run that models of this kind, or this one, cannot have."""
        cls.check_sampler(config.sampler)
        for size in config.image_sizes:
            try:
                cls.check_size(configs, *size)
            except ValueError as error:
                if config.sizes is None:
                    raise
                raise ValueError(f"sizes has {'x'.join(map(str, size))}, whose {error}") from None
        for name, value in (("train_image_credit", "coca"), ("objective", "rwr")):
            if getattr(config, name) == value and "ddim" not in cls.samplers:
                raise ValueError(
                    f"{name} is {value!r}, which is made of DDIM's noise levels, and the model is a {cls.name}, which "
                    f"is not sampled by DDIM: leave out {name}"
                )

    @classmethod
    def check_sampler(cls, sampler: str) -> None:
        """Raises `ValueError` for a sampler that the model does not have."""
        if sampler != "auto" and sampler not in cls.samplers:
            raise ValueError(
                f"sampler is {sampler!r}, and the model is a {cls.name}, which samples with "
                f"{' or '.join(map(repr, cls.samplers))}: use 'auto'"
            )

    @classmethod
    def default_size(cls, configs: Mapping[str, Config]) -> tuple[int, int]:
        """(H, W) of the latents of an image of the model's own size."""
        size = configs[cls.network]["sample_size"]
        return (size, size) if isinstance(size, int) else tuple(size)

    @classmethod
    def channels(cls, configs: Mapping[str, Config]) -> int:
        """C of the latents."""
        return configs[cls.network]["in_channels"]

    @classmethod
    def vae_scale(cls, configs: Mapping[str, Config]) -> int:
        """Pixels of an image per pixel of its latents, in each direction: each block of the VAE but the last halves."""
        return 2 ** (len(configs["vae"]["block_out_channels"]) - 1)

    @classmethod
    def divisor(cls, configs: Mapping[str, Config]) -> int:
        """What the height and width of images must be multiples of: diffusers' pipelines demand at least 8."""
        return max(8, cls.vae_scale(configs))

    @classmethod
    def latent_shape_of(
        cls, configs: Mapping[str, Config], height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """(C, H, W) of the latents of images of `height` x `width` pixels, by default of the model's own size."""
        own = cls.default_size(configs)
        rows, columns = (
            latent if pixels is None else pixels // cls.vae_scale(configs)
            for latent, pixels in zip(own, (height, width), strict=True)
        )
        return cls.channels(configs), rows, columns

    @classmethod
    def image_size_of(
        cls, configs: Mapping[str, Config], height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """(height, width) of images in pixels: what is given, by default the model's own."""
        scale = cls.vae_scale(configs)
        rows, columns = cls.default_size(configs)
        return height or rows * scale, width or columns * scale

    @classmethod
    def check_size(cls, configs: Mapping[str, Config], height: int | None, width: int | None) -> None:
        """Raises `ValueError` for a height or width that the latents cannot have."""
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and pixels % (step := cls.divisor(configs)):
                raise ValueError(
                    f"{name} is {pixels}, which {step} does not divide, as the model needs it: use "
                    f"{max(step, round(pixels / step) * step)}"
                )

    @classmethod
    def dtype_of(cls, part: str, config: Config, dtype: torch.dtype) -> torch.dtype:
        """The precision of a frozen part in a run that computes in `dtype`."""
        return dtype

    # the loaded model

    def parts_configs(self) -> dict[str, Config]:
        """The configs of the network and the VAE."""
        found = {self.network: self.pipe_part(self.network).config}
        # a user's own pipeline may have a VAE of any kind
        if (vae := getattr(self.pipe_part("vae"), "config", None)) is not None:
            found["vae"] = vae
        return found

    def pipe_part(self, name: str) -> Any:
        """A part of the pipeline, or None if it has none of this name."""
        return getattr(self.pipe, name, None)

    @property
    def denoiser(self) -> Any:
        """The trained network."""
        return self.pipe_part(self.network)

    @property
    def frozen_parts(self) -> dict[str, Any]:
        """The frozen networks that the model has, by name."""
        return {name: part for name in self.frozen if (part := self.pipe_part(name)) is not None}

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The text encoders that the model has, by name."""
        return {name: part for name, part in self.frozen_parts.items() if name != "vae"}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image's latents."""
        return self.latent_shape_of(self.parts_configs(), self.height, self.width)

    # prompts

    def encoding_on(self, device: torch.device) -> AbstractContextManager[None]:
        """A context in which the text encoders compute on `device`; those that are not there pass it block by block."""
        return on_device(self.text_encoders.values(), device, by_blocks=True)

    def encode(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Encodes B prompts: (token ids [B, L'], embeddings [B, L, D]), on the device."""
        raise NotImplementedError

    def tokens(self, prompts: Sequence[str]) -> Any:
        """The first tokenizer's ids and mask, [B, L] each, truncated or padded to its length."""
        tokenizer = self.pipe.tokenizer
        # a textual inversion of several vectors is one word in the prompt and several tokens
        whole = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)
        cut = {"truncation": True, "max_length": tokenizer.model_max_length}
        return tokenizer(whole, return_tensors="pt", padding="max_length", **cut)

    def no_negative(self, empty: Tensor) -> Tensor:
        """What guidance leads away from without a negative prompt, from the embedding `empty` [1, L, D] of ''."""
        return empty

    def negatives(self, prompt: str | None, count: int) -> list[str] | None:
        """The argument `negative_prompt` of the pipeline's call for `count` prompts of a run."""
        return [prompt or ""] * count

    def prepare_prompts(self, given: Prompts, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The embeddings of a call of the pipeline: (of the prompts, and if it guides, of the negative prompts).

        Raises `ValueError` for arguments that do not fit together.
        """
        raise NotImplementedError

    # steps

    def set_steps(self, steps: int, device: torch.device | str) -> None:
        """Makes `steps` the number of sampled steps T, in the pipeline's scheduler, which the copies of `at` share."""
        raise NotImplementedError

    @property
    def num_steps(self) -> int | None:
        """T, or None before `set_steps`."""
        raise NotImplementedError

    @property
    def keys(self) -> Tensor:
        """The sampled steps in order, [T] int64."""
        raise NotImplementedError

    def steps_table(self, level: float, device: torch.device, credit: str) -> Tensor:
        """`table` without a window. The same tensor whenever nothing has changed: CUDA graphs read it."""
        raise NotImplementedError

    def has_noise(self, step: int) -> bool:
        """Whether the sampled step of this number, counted from 0, has noise, and so a density."""
        first, last = self.window or (0, step)
        return first <= step <= last and (self.last_step_has_noise or step < len(self.keys) - 1)

    def table(self, level: float, device: torch.device, credit: str = "none") -> Tensor:
        """(c_x, c_m, sigma, credit) of the step from each key, [K, 4] fp32 on the device.

        Steps outside the window are those of level 0, without noise, and credits are those of the steps within.

        Args:
            level: of noise, the setting `sample_eta`.
            credit: the setting `step_credit`.
        """
        noisy = self.steps_table(level, device, credit)
        if self.window is None or level == 0:
            return noisy
        name = (self.window, level, device, credit)
        made = self._windowed.get(name)
        if made is None or made[0] is not noisy:
            first, last = self.window
            inside = self.keys[first : last + 1].to(device)
            windowed = self.steps_table(0.0, device, credit).clone()
            windowed[inside] = noisy[inside]
            windowed[inside, 3] = of_window(credit, noisy[inside])
            self._windowed[name] = made = noisy, windowed
        return made[1]

    def steps_predictions(self, level: float) -> list[Prediction]:
        """`predictions` without a window."""
        raise NotImplementedError

    def predictions(self, level: float) -> list[Prediction]:
        """How the final latents that each of the T sampled steps predicts follow from its latents and noise."""
        noisy = self.steps_predictions(level)
        if self.window is None or level == 0:
            return noisy
        first, last = self.window
        silent = self.steps_predictions(0.0)
        return [*silent[:first], *noisy[first : last + 1], *silent[last + 1 :]]

    # the network

    def call(
        self, rows: Tensor, keys: Tensor, embeds: Tensor, attention_kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The network's output [R, C, H, W] for latents [R, C, H, W], keys [R] or [], and embeddings [R, L, D].

        A UNet that shares the halves of guidance (`unet/shared_halves.py`) may be given R / 2 latents and keys.

        Everything that it reads beside its arguments stays at its address, as CUDA graphs need it.
        """
        raise NotImplementedError

    def latents_of_vae(self, latents: Tensor) -> Tensor:
        """What the VAE decodes, from latents [B, C, H, W] as the network has them."""
        return latents / self.pipe.vae.config.scaling_factor


def with_pooled(tokens: Tensor, pooled: Tensor) -> Tensor:
    """Token rows [B, L', D] and a pooled embedding [B, P] as one tensor [B, L' + ceil(P / D), D]."""
    width = tokens.shape[2]
    rows = -(-pooled.shape[1] // width)
    padded = nn.functional.pad(pooled.to(tokens.dtype), (0, rows * width - pooled.shape[1]))
    return torch.cat([tokens, padded.unflatten(1, (rows, width))], dim=1)


def without_pooled(embeds: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(token rows, pooled embedding of `width` elements) of `with_pooled`, both contiguous."""
    rows = -(-width // embeds.shape[2])
    return embeds[:, :-rows].contiguous(), embeds[:, -rows:].flatten(1)[:, :width].contiguous()
