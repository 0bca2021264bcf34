"""Stable Diffusion as the trainer sees it: TRL's `DDPOStableDiffusionPipeline` and its default implementation."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from ddpo_fast import ops, sampler, tiny_sd
from ddpo_fast.noise_schedule import NoiseSchedule
from ddpo_fast.sampler import DDPOPipelineOutput, DDPOSchedulerOutput

logger = logging.getLogger(__name__)

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
ADAPTER = "default"


class DDPOStableDiffusionPipeline:
    """What `DDPOTrainer` asks of a pipeline; subclass it, or `DefaultDDPOStableDiffusionPipeline`, for your own."""

    def __call__(self, *args: Any, **kwargs: Any) -> DDPOPipelineOutput:
        """Draws images and returns them with all latents and log-probs."""
        raise NotImplementedError

    def scheduler_step(self, *args: Any, **kwargs: Any) -> DDPOSchedulerOutput:
        """One denoising step and its log-prob."""
        raise NotImplementedError

    @property
    def unet(self) -> Any:
        raise NotImplementedError

    @property
    def vae(self) -> Any:
        raise NotImplementedError

    @property
    def tokenizer(self) -> Any:
        raise NotImplementedError

    @property
    def scheduler(self) -> Any:
        raise NotImplementedError

    @property
    def text_encoder(self) -> Any:
        raise NotImplementedError

    @property
    def autocast(self) -> Callable[[], AbstractContextManager] | None:
        """A context for the pipeline's calls in place of the accelerator's autocast, or None."""
        raise NotImplementedError

    def set_progress_bar_config(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def get_trainable_layers(self, *args: Any, **kwargs: Any) -> Any:
        """The module, or the list of parameters, to train."""
        raise NotImplementedError

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """`(models, weights, output_dir)`: writes the weights of `models[0]`."""
        raise NotImplementedError

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """`(models, input_dir)`: reads them back."""
        raise NotImplementedError


class DefaultDDPOStableDiffusionPipeline(DDPOStableDiffusionPipeline):
    """A diffusers `StableDiffusionPipeline` with a DDIM scheduler, trained by LoRA or in all its UNet's weights.

    Args:
        pretrained_model_name: folder or Hub id; '' is the bundled tiny model. A folder with LoRA weights continues
            with that adapter.
        pretrained_model_revision: git revision on the Hub.
        use_lora: train a low-rank adapter (TRL's default) or all weights.
        lora_rank, lora_alpha, lora_target_modules: the adapter's shape; the defaults are TRL's.

    Raises `ValueError` for a folder that holds no pipeline, `OSError` for a pipeline that cannot be loaded.
    """

    def __init__(
        self,
        pretrained_model_name: str,
        *,
        pretrained_model_revision: str = "main",
        use_lora: bool = True,
        lora_rank: int = 4,
        lora_alpha: int = 4,
        lora_target_modules: Sequence[str] = ("to_k", "to_q", "to_v", "to_out.0"),
    ) -> None:
        self.pretrained_model = str(pretrained_model_name)
        self.pretrained_revision = pretrained_model_revision
        self.use_lora = use_lora
        self.sd_pipeline: Any = load_stable_diffusion(self.pretrained_model, pretrained_model_revision)
        self.lora_config = LoraConfig(
            r=lora_rank,
            lora_alpha=lora_alpha,
            init_lora_weights="gaussian",
            target_modules=list(lora_target_modules),
        )
        self._load_lora()
        self.sd_pipeline.scheduler = DDIMScheduler.from_config(self.sd_pipeline.scheduler.config)
        self.sd_pipeline.safety_checker = None
        self.sd_pipeline.vae.requires_grad_(False)
        self.sd_pipeline.text_encoder.requires_grad_(False)
        self.sd_pipeline.unet.requires_grad_(not self.use_lora)

    def _load_lora(self) -> None:
        """Takes up the adapter that lies beside the model, if one does: training then continues it."""
        folder = model_folder(self.pretrained_model)
        if folder is not None and not (folder / LORA_WEIGHTS).exists():
            return
        try:
            self.sd_pipeline.load_lora_weights(
                str(folder or self.pretrained_model),
                weight_name=LORA_WEIGHTS,
                revision=self.pretrained_revision,
                adapter_name=ADAPTER,
            )
            self.use_lora = True
        except OSError:
            logger.info("no LoRA weights beside %s: a new adapter is made", self.pretrained_model)

    def __call__(self, *args: Any, **kwargs: Any) -> DDPOPipelineOutput:
        return sampler.generate(self.sd_pipeline, *args, **kwargs)

    def rgb_with_grad(self, *args: Any, **kwargs: Any) -> DDPOPipelineOutput:
        """Like a call, and the images carry a gradient to the UNet."""
        return sampler.generate_with_grad(self.sd_pipeline, *args, **kwargs)

    def scheduler_step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        prev_sample: torch.Tensor | None = None,
    ) -> DDPOSchedulerOutput:
        """The DDIM step from `sample` [B, C, H, W] at `timestep` ([B] or one for all) and its log-prob [B].

        With `prev_sample` the step is scored, without it drawn. `use_clipped_model_output` has no effect: the
        scheduler does not clip. Raises `ValueError` if both `prev_sample` and `generator` are given.
        """
        if prev_sample is not None and generator is not None:
            raise ValueError("pass either generator (to draw the next sample) or prev_sample (to score it), not both")
        timestep = torch.as_tensor(timestep, device=sample.device)
        step = [c.expand(len(sample)) for c in NoiseSchedule.of(self.scheduler, eta, sample.device).at(timestep)]
        if prev_sample is None:
            noise = sampler.randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            prev_sample = ops.take_step(model_output, sample, noise, *step)
        log_probs = ops.score_step(model_output, sample, prev_sample, *step) if eta > 0 else None
        return DDPOSchedulerOutput(prev_sample, log_probs)

    @property
    def unet(self) -> Any:
        return self.sd_pipeline.unet

    @property
    def vae(self) -> Any:
        return self.sd_pipeline.vae

    @property
    def tokenizer(self) -> Any:
        return self.sd_pipeline.tokenizer

    @property
    def scheduler(self) -> Any:
        return self.sd_pipeline.scheduler

    @property
    def text_encoder(self) -> Any:
        return self.sd_pipeline.text_encoder

    @property
    def autocast(self) -> Callable[[], AbstractContextManager] | None:
        return None

    def set_progress_bar_config(self, *args: Any, **kwargs: Any) -> None:
        self.sd_pipeline.set_progress_bar_config(*args, **kwargs)

    def get_trainable_layers(self) -> Any:
        """The UNet, whose trainable parameters are in fp32: all of them, or the adapter's."""
        if self.use_lora:
            if ADAPTER not in getattr(self.unet, "peft_config", {}):
                self.unet.add_adapter(self.lora_config, ADAPTER)
            for name, parameter in self.unet.named_parameters():
                parameter.requires_grad_("lora_" in name)
        for parameter in self.unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return self.unet

    def save_pretrained(self, output_dir: str | Path) -> None:
        """A folder that plain diffusers opens: the whole pipeline, and the adapter's weights beside it."""
        if not self.use_lora:
            self.sd_pipeline.save_pretrained(output_dir)
            return
        self._save_lora(self.unet, output_dir)
        plain = copy.copy(self.sd_pipeline)
        plain.unet = without_adapter(self.unet)
        plain.save_pretrained(output_dir)

    def save_checkpoint(self, models: list, weights: list, output_dir: str | Path) -> None:
        """Writes the trained weights of `models[0]`: the adapter's file, or a `unet` folder."""
        if self.use_lora:
            self._save_lora(_only(models), output_dir)
        else:
            _only(models).save_pretrained(Path(output_dir) / "unet")

    def load_checkpoint(self, models: list, input_dir: str | Path) -> None:
        """Reads what `save_checkpoint` wrote into the parameters that are being trained."""
        if self.use_lora:
            state = load_file(Path(input_dir) / LORA_WEIGHTS)
            state = {name.removeprefix("unet."): value for name, value in state.items()}
            problems = set_peft_model_state_dict(
                _only(models), convert_unet_state_dict_to_peft(state), adapter_name=ADAPTER
            )
            if problems is not None and problems.unexpected_keys:
                raise ValueError(f"{input_dir} holds another adapter: unexpected {problems.unexpected_keys[0]}")
        else:
            loaded = UNet2DConditionModel.from_pretrained(Path(input_dir) / "unet", torch_dtype=torch.float32)
            _only(models).load_state_dict(loaded.state_dict())

    def _save_lora(self, unet: Any, output_dir: str | Path) -> None:
        weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name=ADAPTER))
        settings = unet.peft_config[ADAPTER].to_dict()
        self.sd_pipeline.save_lora_weights(
            save_directory=output_dir,
            # safetensors takes them only so, and an adapted convolution's may lie otherwise
            unet_lora_layers={name: weight.contiguous() for name, weight in weights.items()},
            # a set has another order in each process, and equal runs should leave equal files
            unet_lora_adapter_metadata={k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()},
        )


def _only(models: list) -> Any:
    if len(models) != 1:
        raise ValueError(f"expected the one trained model, got {len(models)}")
    return models[0]


def without_adapter(unet: Any) -> UNet2DConditionModel:
    """A UNet that shares the frozen weights of an adapted one and has diffusers' own parameter names."""
    with torch.device("meta"):
        plain = UNet2DConditionModel.from_config(unet.config)
    frozen = {name.replace(".base_layer", ""): p for name, p in unet.state_dict().items() if "lora_" not in name}
    plain.load_state_dict(frozen, assign=True)
    return plain


def model_folder(name: str) -> Path | None:
    """The local folder that `name` means, or None for a Hub id. Raises `ValueError` for a folder without a model."""
    if name == "":
        return tiny_sd.MODEL
    path = Path(name).expanduser()
    if not path.exists() and not name.startswith(("/", "./", "../", "~")):
        return None
    if not (path / "model_index.json").exists():
        raise ValueError(
            f"pretrained_model is {name!r}, which is no diffusers pipeline: it has no model_index.json"
            if path.exists()
            else f"pretrained_model is {name!r}, and there is no such folder"
        )
    return path


def load_stable_diffusion(name: str, revision: str = "main") -> Any:
    """A `StableDiffusionPipeline` in fp32 (whatever precision is stored) from a folder or the Hub."""
    folder = model_folder(name)
    try:
        return StableDiffusionPipeline.from_pretrained(
            str(folder or name), revision=revision, torch_dtype=torch.float32
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(f"pretrained_model {name!r} could not be loaded: {reason}") from error
