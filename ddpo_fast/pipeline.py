"""Stable Diffusion as the trainer sees it: TRL's `DDPOStableDiffusionPipeline` and its default implementation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from packaging.version import Version
from peft import LoraConfig

from ddpo_fast import lora, ops, sampler
from ddpo_fast.ddim import DDIMCoefficients, check_steps
from ddpo_fast.lora import ADAPTER, LORA_WEIGHTS, TRL_RANK, TRL_TARGETS
from ddpo_fast.model_configs import check_model, first_line, model_folder, pickle_problem, variant_of
from ddpo_fast.sampler import DDPOPipelineOutput, DDPOSchedulerOutput

# diffusers 0.42 warns of the older name
IN_FP32: dict[str, Any] = {
    "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype": torch.float32
}


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
        pretrained_model_name: folder or Hub id; '' is the bundled tiny model. With an adapter's file beside it,
            training goes on with that adapter.
        pretrained_model_revision: git revision on the Hub.
        use_lora: train a low-rank adapter (TRL's default) or all weights.
        lora_rank, lora_alpha, lora_target_modules: the shape of a new adapter; the defaults are TRL's.

    `lora_config` is the shape of the adapter that is trained.

    Raises `ValueError` for a model that cannot be trained, told from its configs, and for options that contradict the
    adapter beside it; `OSError` for what cannot be read.
    """

    def __init__(
        self,
        pretrained_model_name: str,
        *,
        pretrained_model_revision: str = "main",
        use_lora: bool = True,
        lora_rank: int = TRL_RANK,
        lora_alpha: float = TRL_RANK,
        lora_target_modules: Sequence[str] = TRL_TARGETS,
    ) -> None:
        name = str(pretrained_model_name)
        folder = model_folder(name)
        # a resumed run may be started elsewhere
        self.pretrained_model = str(folder.absolute()) if name and folder else name
        self.pretrained_revision = pretrained_model_revision
        self.use_lora = use_lora
        targets = [lora_target_modules] if isinstance(lora_target_modules, str) else list(lora_target_modules)
        beside = lora.find_adapter(self.pretrained_model, pretrained_model_revision)
        if beside is not None and not use_lora:
            raise ValueError(
                f"use_lora is False (--full-finetune), and there is an adapter beside the model, {beside}: make one "
                f"model of both first ({lora.FUSE}), move the adapter away, or train it with use_lora=True"
            )
        self.sd_pipeline: Any = load_stable_diffusion(self.pretrained_model, pretrained_model_revision)
        self.lora_config = LoraConfig(
            r=lora_rank,
            lora_alpha=lora_alpha,  # type: ignore[arg-type] # peft divides it by the rank, whatever it is
            init_lora_weights="gaussian",
            target_modules=targets,
        )
        if beside is not None:
            lora.load_adapter(self.sd_pipeline, beside)
        # an adapter may be the text encoder's alone
        if beside is not None and ADAPTER in getattr(self.unet, "peft_config", {}):
            lora.check_options(self.unet, beside, lora_rank, lora_alpha, targets)
            self.lora_config = self.unet.peft_config[ADAPTER]
        elif use_lora:
            lora.check_new(self.unet, self.lora_config)
        self.sd_pipeline.vae.requires_grad_(False)
        self.sd_pipeline.text_encoder.requires_grad_(False)
        self.sd_pipeline.unet.requires_grad_(not self.use_lora)

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
        step = [c.expand(len(sample)) for c in DDIMCoefficients.of(self.scheduler, eta, sample.device).at(timestep)]
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
        """The UNet, whose trainable parameters are in fp32: all of them, or the adapter's.

        Other adapters that are active stay in force and are not trained.
        """
        if self.use_lora:
            lora.add_adapter(self.unet, self.lora_config)
        else:
            lora.check_none(self.unet)
        for parameter in self.unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return self.unet

    def save_pretrained(self, output_dir: str | Path) -> None:
        """A folder that plain diffusers opens: the whole pipeline, and the adapter's weights beside it."""
        plain = copy.copy(self.sd_pipeline)
        for name in ("unet", "text_encoder"):
            network = getattr(self.sd_pipeline, name)
            if lora.has_adapter(network):
                setattr(plain, name, lora.without_adapter(network))
        if self.use_lora:
            lora.save_adapter(self.sd_pipeline, self.unet, output_dir)
        plain.save_pretrained(output_dir)
        _let_read(Path(output_dir))

    def save_checkpoint(self, models: list, weights: list, output_dir: str | Path) -> None:
        """Writes the trained weights of `models[0]`: the adapter's file, or a `unet` folder."""
        if self.use_lora:
            lora.save_adapter(self.sd_pipeline, _only(models), output_dir)
        else:
            _only(models).save_pretrained(Path(output_dir) / "unet")
        _let_read(Path(output_dir))

    def load_checkpoint(self, models: list, input_dir: str | Path) -> None:
        """Reads what `save_checkpoint` wrote into the parameters that are being trained."""
        if self.use_lora:
            lora.read_adapter(_only(models), Path(input_dir) / LORA_WEIGHTS)
        else:
            loaded = UNet2DConditionModel.from_pretrained(Path(input_dir) / "unet", use_safetensors=True, **IN_FP32)
            _only(models).load_state_dict(loaded.state_dict())


def _only(models: list) -> Any:
    if len(models) != 1:
        raise ValueError(f"expected the one trained model, got {len(models)}")
    return models[0]


def _let_read(folder: Path) -> None:
    """Gives the weights in a folder the mode of any new file; safetensors keeps them to their owner."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in (*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")):
        path.chmod(mode)


def check_sampling(pipeline: DDPOStableDiffusionPipeline, steps: int, eta: float) -> None:
    """Raises `ValueError` where a pipeline that samples by this module's steps has no such steps to take."""
    if isinstance(pipeline, DefaultDDPOStableDiffusionPipeline):
        kind = type(pipeline)
        ours = DefaultDDPOStableDiffusionPipeline
        if kind.__call__ is ours.__call__ or kind.scheduler_step is ours.scheduler_step:
            check_steps(pipeline.scheduler, steps, eta)


def load_stable_diffusion(name: str, revision: str = "main") -> Any:
    """A `StableDiffusionPipeline` in fp32 (whatever precision is stored) with DDIM, from a folder or the Hub.

    Raises `ValueError` for a model that cannot be trained, `OSError` for one that cannot be read.
    """
    configs = check_model(name, revision)
    folder = model_folder(name)
    try:
        pipe: Any = StableDiffusionPipeline.from_pretrained(
            str(folder or name),
            revision=revision,
            variant=variant_of(folder) if folder else None,
            use_safetensors=True,
            scheduler=configs.ddim,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **IN_FP32,
        )
    except Exception as error:
        reason = first_line(error)
        if "`safetensors` weights" in reason:
            raise ValueError(f"pretrained_model {name!r} cannot be trained: {pickle_problem('.bin files')}") from None
        raise OSError(f"pretrained_model {name!r} could not be loaded: {reason}") from error
    known = pipe.text_encoder.get_input_embeddings().num_embeddings
    if len(pipe.tokenizer) > known:
        raise ValueError(
            f"pretrained_model {name!r} cannot be trained: its tokenizer has {len(pipe.tokenizer)} tokens, and its "
            f"text_encoder knows {known}: they are not of one model"
        )
    return pipe
