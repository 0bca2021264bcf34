"""The pipeline interface that `DDPOTrainer` uses, and its default implementation for Stable Diffusion.

Both have TRL's names and signatures, so that subclasses written for TRL work.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from ddpo_fast import lora, ops, sampler
from ddpo_fast.config import DDPOConfig
from ddpo_fast.families import Family, family_of_pipeline
from ddpo_fast.loading import IN_FP32, load_pipeline
from ddpo_fast.lora import ADAPTER, LORA_WEIGHTS, TRL_RANK, TRL_TARGETS
from ddpo_fast.model_configs import model_folder
from ddpo_fast.quantize_frozen import check_is_lora
from ddpo_fast.run_folder.files import follow_umask
from ddpo_fast.sampler import DDPOPipelineOutput, DDPOSchedulerOutput
from ddpo_fast.single_file import file_of
from ddpo_fast.tiny_sd import MODELS


class DDPOStableDiffusionPipeline:
    """The interface that `DDPOTrainer` needs of a pipeline. Your own can subclass it, or the default implementation."""

    def __call__(self, *args: Any, **kwargs: Any) -> DDPOPipelineOutput:
        """Samples images and returns them with the latents and log-probs of all steps."""
        raise NotImplementedError

    def scheduler_step(self, *args: Any, **kwargs: Any) -> DDPOSchedulerOutput:
        """Takes or scores one denoising step."""
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
        """A context manager in which the UNet is called with weights in fp32; None for weights in `mixed_precision`."""
        raise NotImplementedError

    def set_progress_bar_config(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def get_trainable_layers(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the module, or the list of parameters, that is trained."""
        raise NotImplementedError

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Called with `(models, weights, output_dir)`: writes the trained weights of `models[0]`."""
        raise NotImplementedError

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Called with `(models, input_dir)`: reads what `save_checkpoint` wrote."""
        raise NotImplementedError


class DefaultDDPOStableDiffusionPipeline(DDPOStableDiffusionPipeline):
    """A diffusers pipeline of one of `families`, of which the denoising network, or a LoRA of it, is trained.

    Args:
        pretrained_model_name: folder, Hub id, or `.safetensors` file of Stable Diffusion 1.x, 2.x or XL in its original
            layout; '' and 'bundled-flow' are the bundled tiny models. If there is an adapter's file beside the model's
            folders, training continues with that adapter.
        pretrained_model_revision: git revision on the Hub.
        single_file_config: folder or Hub id of a diffusers model of the same kind, whose configs and tokenizers are
            those of a single file. By default they are looked for beside the file, then in the Hub's cache.
        use_lora: whether to train a low-rank adapter (TRL's default) or all weights of the network.
        lora_rank, lora_alpha, lora_target_modules: the settings of a new adapter; the defaults are TRL's, and stand for
            the family's usual layers.

    The attribute `lora_config` holds the settings of the adapter that is trained.

    Raises `ValueError` for a model that cannot be trained (this is decided from its configs), and for options that
    contradict the adapter beside the model; `OSError` for files that cannot be read.
    """

    def __init__(
        self,
        pretrained_model_name: str,
        *,
        pretrained_model_revision: str = "main",
        single_file_config: str = "",
        use_lora: bool = True,
        lora_rank: int = TRL_RANK,
        lora_alpha: float = TRL_RANK,
        lora_target_modules: Sequence[str] = TRL_TARGETS,
    ) -> None:
        name = str(pretrained_model_name)
        local = file_of(name) or model_folder(name)
        # absolute, because a resumed run may be started in another folder
        self.pretrained_model = str(local.absolute()) if name not in MODELS and local else name
        self.pretrained_revision = pretrained_model_revision
        self.single_file_config = single_file_config
        if single_file_config and (configs := Path(single_file_config).expanduser()).exists():
            self.single_file_config = str(configs.absolute())
        self.use_lora = use_lora
        targets = [lora_target_modules] if isinstance(lora_target_modules, str) else list(lora_target_modules)
        beside = lora.find_adapter(self.pretrained_model, pretrained_model_revision)
        if beside is not None and not use_lora:
            raise ValueError(
                f"use_lora is False (--full-finetune), and there is an adapter beside the model, {beside}: make one "
                f"model of both first ({lora.FUSE_COMMANDS}), move the adapter away, or train it with use_lora=True"
            )
        self.sd_pipeline: Any = load_pipeline(self.pretrained_model, pretrained_model_revision, self.single_file_config)
        self.lora_config = LoraConfig(
            r=lora_rank,
            lora_alpha=lora_alpha,  # peft divides it by the rank, whatever it is
            init_lora_weights="gaussian",
            target_modules=lora.usual_targets(self.family) if set(targets) == set(TRL_TARGETS) else targets,
        )
        if beside is not None:
            lora.load_adapter(self.family, beside)
        # the file may hold a part for the text encoder only; then the UNet gets a new adapter
        if beside is not None and ADAPTER in getattr(self.unet, "peft_config", {}):
            lora.check_options(self.unet, beside, lora_rank, lora_alpha, targets)
            self.lora_config = self.unet.peft_config[ADAPTER]
        elif use_lora:
            lora.check_new_adapter(self.unet, self.lora_config)
        for part in self.family.frozen_parts.values():
            part.requires_grad_(False)
        self.unet.requires_grad_(not self.use_lora)

    def __call__(self, *args: Any, **kwargs: Any) -> DDPOPipelineOutput:
        return sampler.generate(self.family, *args, **kwargs)

    def rgb_with_grad(self, *args: Any, **kwargs: Any) -> DDPOPipelineOutput:
        """The same as calling the pipeline, with images through which a gradient flows to the UNet."""
        return sampler.generate_with_grad(self.family, *args, **kwargs)

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
        """The DDIM step from `sample` [B, C, H, W] at `timestep` ([B], or one for all) and its log-prob [B].

        Without `prev_sample` the step is sampled; with it, the step from `sample` to `prev_sample` is scored. With
        `eta=0` the step has no density, and the log-probs are None. `use_clipped_model_output` has no effect, because
        the scheduler does not clip. Raises `ValueError` if both `prev_sample` and `generator` are given.
        """
        if prev_sample is not None and generator is not None:
            raise ValueError("pass either generator (to draw the next sample) or prev_sample (to score it), not both")
        timestep = torch.as_tensor(timestep, device=sample.device)
        table = self.family.table(eta, sample.device)
        # `take` and not `[]`: indexing by a tensor without dimensions copies its value to the host, and so waits for
        # all work that is queued on the device
        step = [table[:, i].take(timestep).expand(len(sample)) for i in range(3)]
        if prev_sample is None:
            noise = sampler.randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            prev_sample = ops.take_step(model_output, sample, noise, *step)
        log_probs = ops.score_step(model_output, sample, prev_sample, *step) if eta > 0 else None
        return DDPOSchedulerOutput(prev_sample, log_probs)

    @property
    def family(self) -> Family:
        """The kind of model that the pipeline is, with the run's image size and sampler."""
        made = self.__dict__.get("_family")
        if made is None or made.pipe is not self.sd_pipeline:
            made = self._family = family_of_pipeline(self.sd_pipeline)
        return made

    @property
    def unet(self) -> Any:
        """The trained network."""
        return self.family.denoiser

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
        """Returns the UNet, with trainable parameters in fp32: the trained adapter's, or all of them.

        Other active adapters stay active and are not trained.
        """
        if self.use_lora:
            lora.add_adapter(self.unet, self.lora_config)
        else:
            lora.check_no_adapter(self.unet)
        for parameter in self.unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return self.unet

    def save_pretrained(self, output_dir: str | Path) -> None:
        """Writes a folder that diffusers opens: the whole pipeline, and the trained adapter's file beside it."""
        plain = copy.copy(self.sd_pipeline)
        for name, network in {self.family.network: self.unet, **self.family.text_encoders}.items():
            if lora.has_adapter(network):
                setattr(plain, name, lora.without_adapter(network))
        if self.use_lora:
            lora.save_adapter(self.family, self.unet, output_dir)
        plain.save_pretrained(output_dir)
        _give_default_mode(Path(output_dir))

    def save_checkpoint(self, models: list, weights: list, output_dir: str | Path) -> None:
        """Writes the trained weights of `models[0]`: the adapter's file, or a folder named after the network."""
        if self.use_lora:
            lora.save_adapter(self.family, _only(models), output_dir)
        else:
            _only(models).save_pretrained(Path(output_dir) / self.family.network)
        _give_default_mode(Path(output_dir))

    def load_checkpoint(self, models: list, input_dir: str | Path) -> None:
        """Reads what `save_checkpoint` wrote into the trained parameters of `models[0]`."""
        if self.use_lora:
            lora.read_adapter(self.family, _only(models), Path(input_dir) / LORA_WEIGHTS)
        else:
            kind = type(_only(models))
            loaded = kind.from_pretrained(Path(input_dir) / self.family.network, use_safetensors=True, **IN_FP32)
            _only(models).load_state_dict(loaded.state_dict())


def _only(models: list) -> Any:
    if len(models) != 1:
        raise ValueError(f"expected the one trained model, got {len(models)}")
    return models[0]


def _give_default_mode(folder: Path) -> None:
    # only what is written here: the user's folder may hold other files
    follow_umask(folder, "*.safetensors", "*/*.safetensors")


def check_pipeline(pipeline: DDPOStableDiffusionPipeline, config: DDPOConfig) -> None:
    """Raises `ValueError` if a pipeline cannot take `sample_num_steps` steps, or cannot do what a setting asks of it.

    A pipeline whose class overrides both `__call__` and `scheduler_step` may sample by other steps than DDIM's, so its
    scheduler is not checked.
    """
    kind, ours, family = type(pipeline), DefaultDDPOStableDiffusionPipeline, family_of_pipeline(pipeline)
    if family.denoiser is None:
        raise ValueError(
            f"sd_pipeline is of class {kind.__name__}, without a {family.network}: give a "
            "DefaultDDPOStableDiffusionPipeline, or a class derived from DDPOStableDiffusionPipeline"
        )
    family.use_settings(config)
    steps_are_ours = ours.__call__ is kind.__call__ or ours.scheduler_step is getattr(kind, "scheduler_step", None)
    if isinstance(pipeline, ours) and steps_are_ours:
        family.check_steps(pipeline.scheduler, config.sample_num_steps, config.sample_eta)
    for name in ("offload_frozen", "embed_prompts_once"):
        if getattr(config, name) and kind.__call__ is not ours.__call__:
            raise ValueError(f"{name} is True, but the pipeline's own __call__ wants its networks on the device")
    check_is_lora(config.quantize_frozen, getattr(pipeline, "use_lora", False))
    if config.kohya_lora:
        lora.check_kohya(family.network, getattr(pipeline, "use_lora", False))
    if config.quantize_frozen != "none" and pipeline.autocast is not None:
        raise ValueError("quantize_frozen is set, but this pipeline has an autocast, which needs fp32: use 'none'")
    if config.train_image_credit != "none" and kind.__call__ is not ours.__call__:
        raise ValueError(
            f"train_image_credit is {config.train_image_credit!r}, but the pipeline's own __call__ does not tell what "
            "each step predicts: use 'none'"
        )
    for size in config.image_sizes if config.train_pool_latents > 1 else []:
        _, *sides = family.latent_shape_of(family.parts_configs(), *size)
        if config.train_pool_latents > min(sides):
            raise ValueError(
                f"train_pool_latents is {config.train_pool_latents}, but the model's latents have {sides[0]} x "
                f"{sides[1]} pixels: use at most {min(sides)}"
            )
    if config.sample_group_noise == "shared" and not _takes(kind.__call__, "latents"):
        raise ValueError(
            "sample_group_noise is 'shared', but the pipeline's own __call__ takes no latents to start from: add that "
            "argument, or use 'own'"
        )
    for side, argument in (("height", "height"), ("width", "width"), ("sizes", "height"), ("sizes", "width")):
        if getattr(config, side) is not None and not _takes(kind.__call__, argument):
            raise ValueError(
                f"{side} is {getattr(config, side)}, but the pipeline's own __call__ takes no argument {argument}: add "
                f"it, or leave out {side}"
            )
    if config.sde_window is not None and kind.__call__ is not ours.__call__:
        raise ValueError(
            f"sde_window is {config.sde_window}, but the pipeline's own __call__ decides which steps have noise: leave "
            "it out"
        )
    if config.cuda_graphs and pipeline.autocast is not None:
        raise ValueError(
            "cuda_graphs is True, but this pipeline has an autocast, whose casts are forgotten before a graph reads "
            "them: leave it out"
        )


def _takes(function: Callable[..., Any], keyword: str) -> bool:
    parameters = inspect.signature(function).parameters
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
