"""`DDPOConfig`: TRL's fields, names and defaults, then this package's own.

Each field has its default, its help on the command line and, if its value is a word from a list, its `choices`. The
list is written only here: the command line and `config_rules` read it from the field.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, TypeAlias, Union

from ddpo_fast import config_rules, package_rules
from ddpo_fast.config_numbers import ConfigNumbers


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


def _mapping(text: str) -> Any:
    return field(default_factory=dict, metadata={"help": f"{text} On the command line: a JSON object."})


# the fields that an image depends on, apart from weights, prompt and noise
SAMPLING_FIELDS = (
    "sample_num_steps",
    "sample_guidance_scale",
    "sample_eta",
    "negative_prompts",
    "height",
    "width",
    "sizes",
    "sampler",
    "sde_window",
)
# where a run reads and writes
PLACE_FIELDS = ("resume_from", "output_dir", "logdir", "run_name", "exp_name")

# A type checker sees the types that fields have after `__post_init__`, and of the precision the type that a run reads,
# which is never None. HfArgumentParser sees the types that may be given: for a mapping also a string, which
# `__post_init__` reads as JSON.
if TYPE_CHECKING:
    Mapping: TypeAlias = dict[str, Any]
    Precision: TypeAlias = str
else:
    Mapping = Optional[Union[dict, str]]  # noqa: UP007, UP045
    Precision = Optional[str]  # noqa: UP045


@dataclass
class DDPOConfig(ConfigNumbers):
    """Settings of a `DDPOTrainer`: every field of TRL 0.23.1's `DDPOConfig` with its default, then ours.

    Works with `transformers.HfArgumentParser`. Raises `ValueError` (`ImportError` for a missing package) in one
    sentence that names the field, its value and the remedy.
    """

    exp_name: str = _option(Path(sys.argv[0]).stem, "Name of this experiment (default: the script's name).")
    run_name: str = _option("", "Name of this run: the folder under `logdir` that it writes to.")
    seed: int = _option(0, "Random seed.")
    log_with: Optional[str] = _option(  # noqa: UP045
        None, "Tracker to log to, beside metrics.jsonl.", choices=[*config_rules.TRACKER_PACKAGES, None]
    )
    tracker_kwargs: Mapping = _mapping("Keyword arguments for the tracker (e.g. wandb_project).")
    accelerator_kwargs: Mapping = _mapping("Keyword arguments for the accelerator.")
    project_kwargs: Mapping = _mapping("Keyword arguments for accelerate's ProjectConfiguration (e.g. project_dir).")
    tracker_project_name: str = _option("trl", "Name of the project in the tracker.")
    logdir: str = _option("logs", "Top-level folder that runs are written to.")
    num_epochs: int = _option(100, "Number of epochs to train.")
    save_freq: int = _option(1, "Number of epochs between checkpoints.")
    num_checkpoint_limit: int = _option(5, "Number of checkpoints to keep; the oldest goes first.")
    # None, which TRL takes too, is accelerate's choice: `processes.with_launch_settings` fills it in for the trainer,
    # and `commands.options.precision_or_default` for a command, whose checks come before the accelerator.
    mixed_precision: Precision = _option(
        "fp16",
        "Precision of the networks (None: what `accelerate launch` was told). Latents stay in fp32.",
        choices=["no", "fp16", "bf16", None],
    )
    allow_tf32: bool = _option(True, "Allow TF32 matrix products on Ampere and newer GPUs.")
    resume_from: str = _option("", "Checkpoint, or folder with checkpoints, to resume from.")
    sample_num_steps: int = _option(50, "Number of denoising steps when sampling.")
    sample_eta: float = _option(
        1.0,
        "Level of the sampler's noise, above 0 and at most 1: for ddim its eta, the share of DDPM's noise. 1 is what "
        "each sampler is published with: 1 for ddim and flow_ddim, 0.7 for flow_sde, 0.8 for cps, 0.3 for dance.",
    )
    sample_guidance_scale: float = _option(5.0, "Classifier-free guidance weight; 1 or less means no guidance.")
    sample_batch_size: int = _option(1, "Images per sampling batch and process.")
    sample_num_batches_per_epoch: int = _option(2, "Sampling batches per epoch and process.")
    train_batch_size: int = _option(1, "Images per training batch and process.")
    train_use_8bit_adam: bool = _option(False, "Use bitsandbytes' 8-bit AdamW.")
    train_learning_rate: float = _option(3e-4, "Learning rate.")
    train_adam_beta1: float = _option(0.9, "Adam beta1.")
    train_adam_beta2: float = _option(0.999, "Adam beta2.")
    train_adam_weight_decay: float = _option(1e-4, "Adam weight decay.")
    train_adam_epsilon: float = _option(1e-8, "Adam epsilon.")
    train_gradient_accumulation_steps: int = _option(1, "Training batches whose gradients make one update.")
    train_max_grad_norm: float = _option(1.0, "Largest gradient norm; longer gradients are scaled down.")
    train_num_inner_epochs: int = _option(1, "Passes over an epoch's samples.")
    train_cfg: bool = _option(True, "Use classifier-free guidance in training too.")
    train_adv_clip_max: float = _option(5.0, "Advantages are clipped to plus and minus this.")
    train_clip_range: float = _option(1e-4, "PPO clip range.")
    train_timestep_fraction: float = _option(1.0, "Fraction of each image's timesteps to train on.")
    per_prompt_stat_tracking: bool = _option(False, "Normalise rewards with running statistics of each prompt.")
    per_prompt_stat_tracking_buffer_size: int = _option(16, "Rewards to remember for each prompt.")
    per_prompt_stat_tracking_min_count: int = _option(16, "Rewards a prompt needs before its own statistics are used.")
    async_reward_computation: bool = _option(False, "Compute rewards in worker threads.")
    max_workers: int = _option(2, "Worker threads for asynchronous rewards.")
    negative_prompts: str = _option("", "Negative prompt; commas separate its parts.")
    push_to_hub: bool = _option(False, "Push the final model to the Hub.")

    # not in TRL
    height: Optional[int] = _option(None, "Height of the images in pixels (default: the model's own).")  # noqa: UP045
    width: Optional[int] = _option(None, "Width of the images in pixels (default: the model's own).")  # noqa: UP045
    sizes: Optional[list[str]] = _option(  # noqa: UP045
        None,
        "Sizes of the images in pixels, each height x width, as in 512x512 512x768: one an epoch, in turn. Rewards are "
        "compared within a size; images of fixed noise have the first.",
    )
    sampler: str = _option(
        "auto",
        "How images are sampled: ddim (Stable Diffusion and XL), or for flow matching flow_sde (Flow-GRPO's), dance "
        "(DanceGRPO's), cps or flow_ddim; auto is ddim or flow_sde.",
        choices=list(config_rules.SAMPLERS),
    )
    sde_window: Optional[list[int]] = _option(  # noqa: UP045
        None,
        "First and last denoising step with noise, counted from 0 (default: all); the others are deterministic and not "
        "trained.",
    )
    export: str = _option(
        "last",
        "The checkpoint that `ddpo-fast train` leaves in final/: the last one, or the best one by the mean held-out "
        "reward, or by that of training where there is no eval_reward.",
        choices=["last", "best"],
    )
    keep_best_checkpoint: bool = _option(False, "Keep the best checkpoint (see export) beyond num_checkpoint_limit.")
    early_stopping_patience: int = _option(
        0, "End the run when its best epoch (see export) is this many epochs ago; 0 never does."
    )
    keep_checkpoint_every: int = _option(
        0, "Keep the checkpoints of epochs that this number divides beyond num_checkpoint_limit; 0 keeps none."
    )
    eval_freq: int = _option(10, "Number of epochs between evaluations, if there is a reward to evaluate by.")
    eval_num_images: int = _option(16, "Images of an evaluation, each of a prompt and noise that stay the same.")
    sample_freq: int = _option(
        0,
        "Number of epochs between images of fixed prompts and noise, kept in the run's folder and sent to the "
        "tracker; also drawn before the first epoch and at the end. 0 draws none.",
    )
    sample_num_images: int = _option(8, "Number of these images, each of a prompt and noise that stay the same.")
    hub_model_id: Optional[str] = _option(  # noqa: UP045
        None, "With push_to_hub: the repository, owner/name or a name of your own (default: the folder's name)."
    )
    hub_private: bool = _option(False, "With push_to_hub: make a new repository a private one.")
    kohya_lora: bool = _option(False, "Write the final LoRA in kohya's layout too, for ComfyUI and A1111.")
    output_dir: Optional[str] = _option(  # noqa: UP045
        None, "Folder that the run writes to (default: project_kwargs['project_dir'], or a new one under `logdir`)."
    )
    train_micro_batch_size: Optional[int] = _option(  # noqa: UP045
        None, "(image, timestep) pairs per UNet call; the gradient does not depend on it (default: what memory allows)."
    )
    train_skip_dead_pairs: bool = _option(
        True,
        "Leave out pairs whose gradient is exactly zero: those of images whose advantage is 0 and, where finding them "
        "first saves time, those that PPO clips.",
    )
    train_warmup_steps: int = _option(0, "Updates over which the learning rate rises linearly.")
    train_recompute_log_probs: bool = _option(
        False, "Score the samples again with training's own forward pass before the first update of an epoch."
    )

    objective: str = _option(
        "ddpo_is",
        "What is minimised: ddpo_is (the clipped ratio of DDPO), ddpo_sf (its score function, one update an epoch) or "
        "rwr (denoising loss weighted by the reward).",
        choices=["ddpo_is", "ddpo_sf", "rwr"],
    )
    step_credit: str = _option(
        "none",
        "How much each denoising step says in the loss: none (as in TRL, where the last steps say most), equal, sqrt "
        "(half-way), or layout (by how much of the image's layout the step's noise decides).",
        choices=["none", "equal", "sqrt", "layout"],
    )
    spatial_credit: float = _option(
        0.0,
        "How much less low spatial frequencies of the latents count in the gradient, which otherwise shifts the whole "
        "image's colour most: frequency f counts (f / highest) to this power. 0 for all alike (TRL).",
    )
    train_pool_latents: int = _option(
        1,
        "Side of the squares of latent pixels whose means the loss looks at, 1 for every pixel (TRL). What early steps "
        "decide is larger than a pixel, and the noise of single pixels only blurs the gradient.",
    )
    train_strongest_share: float = _option(
        1.0,
        "Share of the (image, timestep) pairs that are trained: those whose advantages are largest by amount. It needs "
        "train_skip_dead_pairs to save time. 1 trains all (TRL).",
    )
    train_skip_last_steps: float = _option(0.0, "Share of the denoising steps, the last ones, that are not trained.")
    train_clip_unit: str = _option(
        "ratio",
        "What train_clip_range is a range of: ratio (TRL's), or step (standard deviations of a denoising step, which "
        "mean the same for latents of any size).",
        choices=["ratio", "step"],
    )
    train_target_update: float = _option(
        0.0,
        "How far an update moves the mean of a denoising step, in standard deviations of the step: the learning rate "
        "follows this, and an update that goes too far is shortened. 0 leaves the learning rate alone.",
    )
    train_target_decay: int = _option(
        0,
        "Updates n after which train_target_update has fallen by the square root of 2: update k (from 0) has the "
        "target train_target_update / sqrt(1 + k / n). 0 keeps it.",
    )
    train_guard: bool = _option(
        False,
        "Watch rewards and images: go back to the weights of the best epoch when the mean reward falls far below its "
        "best, and halve the step there and where a prompt's images lose their variety.",
    )
    train_lr_scheduler: str = _option(
        "constant",
        "How the learning rate and train_target_update change over the run after train_warmup_steps.",
        choices=["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"],
    )
    train_advantages: str = _option(
        "std",
        "What divides a reward's distance from the mean: std, robust (median and median absolute deviation), or rank "
        "(normal quantiles of the reward's rank).",
        choices=["std", "robust", "rank"],
    )
    train_kl_weight: float = _option(0.0, "Weight of the KL divergence to the model before training in the loss.")
    train_image_credit: str = _option(
        "none",
        "How an image's advantage is shared among its denoising steps: none (each has it whole), value (by how much "
        "each changed the reward that is to be expected, as learned from the images so far), or coca (by how much "
        "a step brings the predicted image nearer to the final one, arXiv 2505.19196).",
        choices=["none", "value", "coca"],
    )
    rwr_beta: float = _option(0.2, "Inverse temperature of rwr's weights, softmax(beta * reward).")
    rwr_top_fraction: float = _option(0.0, "With rwr: train on this share of the best images alone; 0 weights all.")
    rwr_per_prompt: bool = _option(False, "With rwr: weigh images against those of the same prompt.")
    sample_group_size: int = _option(1, "Images of each drawn prompt; above 1, advantages are within such a group.")
    sample_group_noise: str = _option(
        "own", "The initial noise of a group's images: own (one each) or shared.", choices=["own", "shared"]
    )
    sample_redraws: int = _option(
        0, "Times that groups whose rewards are all equal are replaced by groups of other prompts in an epoch."
    )
    ema_sampling: bool = _option(False, "Sample with the moving average of the weights; needs ema_decay.")

    sample_merge_batches: Optional[int] = _option(  # noqa: UP045
        None,
        "Sampling batches denoised together (default: enough to keep the device busy, as far as they fit in memory).",
    )
    sample_cache: bool = _option(
        True, "Compute prompt embeddings, their keys and values, and time embeddings once and not at every step."
    )
    reward_overlap: bool = _option(
        True, "Sample the next batch in a thread of its own while one is scored, in the thread that calls the trainer."
    )
    kernel_backend: str = _option(
        "auto",
        "Kernels to use where an op has them, else the next best (default: the fastest that run here, or what the "
        "environment's DDPO_FAST_BACKEND says). `ddpo-fast info` lists them.",
        choices=["auto", "triton", "csrc", "reference"],
    )
    attention: str = _option(
        "auto",
        "Attention of the UNet; auto is the fastest on a GPU, measured at the start.",
        choices=["auto", "sdpa", "xformers"],
    )
    fuse_unet: bool = _option(
        True, "Swap layers of the UNet for fused ones where they are faster on the device; same numbers."
    )
    compile_unet: bool = _option(
        False, "Compile the UNet's repeated blocks by torch.compile at their first calls, each kind of block once."
    )
    cuda_graphs: Optional[bool] = _option(  # noqa: UP045
        False,
        "Record the sampling step and the training micro-batch as CUDA graphs, which saves the launches. None, as in "
        "recipes: where a GPU computes a micro-batch faster than the host launches it, and nothing forbids it.",
    )

    zero: int = _option(0, "DeepSpeed ZeRO stage: 0 (none), 1 (states), 2 (and gradients) or 3 (and weights) split.")
    offload: str = _option(
        "none",
        "What stays in host memory: nothing, the fp32 weights and the optimizer's states, or (with --zero 3) also the "
        "half-precision weights.",
        choices=["none", "optimizer", "all"],
    )
    deepspeed: Optional[str] = _option(None, "DeepSpeed's own settings: a JSON file, in place of `zero`.")  # noqa: UP045
    train_paged_adam: bool = _option(False, "With train_use_8bit_adam: states that CUDA pages to the host when needed.")
    train_min_8bit_size: int = _option(4096, "Smaller tensors keep 32-bit states (a LoRA of rank 4 has none larger).")
    train_gradient_dtype: str = _option(
        "fp32", "What gradients are added up in: fp32, or half (mixed_precision's).", choices=["fp32", "half"]
    )
    stochastic_rounding: bool = _option(
        False, "Keep weights in half precision alone and round updates up or down at random, right on average."
    )
    optimizer_in_backward: bool = _option(
        False, "Update each weight as its gradient is ready; for updates of one UNet call, and without a norm to clip."
    )
    gradient_checkpointing: str = _option(
        "none",
        "Activations to compute again in the backward pass: none, selective (norms, SiLU, GEGLU) or blocks (all).",
        choices=["none", "selective", "blocks"],
    )
    vae_slicing: bool = _option(False, "Decode one image at a time.")
    vae_tiling: bool = _option(False, "Decode images in overlapping tiles.")
    offload_frozen: bool = _option(False, "Keep the VAE and the text encoders in host memory while they are idle.")
    embed_prompts_once: bool = _option(False, "Keep prompts' embeddings in the run's folder, and no text encoder.")
    quantize_frozen: str = _option("none", "Bits of linear layers under a LoRA.", choices=["none", "8bit", "4bit"])
    ema_decay: float = _option(0.0, "Decay of a moving average of the trained weights; 0 keeps none.")
    ema_device: str = _option("auto", "Where the average is: with the weights, or cpu.", choices=["auto", "cpu"])
    auto_memory: bool = _option(
        False, "Choose micro-batch, checkpointing, optimizer and offload as `ddpo-fast plan` does for this GPU."
    )
    gpu_memory: Optional[float] = _option(None, "GB of the GPU to use (default: all).")  # noqa: UP045

    def __post_init__(self) -> None:
        for name in ("tracker_kwargs", "accelerator_kwargs", "project_kwargs"):
            setattr(self, name, config_rules.parsed_mapping(name, getattr(self, name)))
        if isinstance(self.negative_prompts, (list, tuple)) and all(isinstance(p, str) for p in self.negative_prompts):
            self.negative_prompts = ", ".join(self.negative_prompts)
        self.check()

    def check(self) -> None:
        """Checks every field, and the rules across fields; the trainer calls this again, as fields may have been set.

        Raises `ValueError`, or `ImportError` for a package that is not installed.
        """
        for option in fields(self):
            setattr(self, option.name, config_rules.plain(getattr(self, option.name)))
        if problem := config_rules.broken_rule(self):
            raise ValueError(problem)
        if self.sizes is not None:
            # pairs of numbers may be given too
            self.sizes = ["{}x{}".format(*config_rules.pixels(size)) for size in self.sizes]
        if self.sde_window is not None and self.sde_window[1] >= self.sample_num_steps:
            raise ValueError(
                f"sde_window is {self.sde_window}, and the steps of sample_num_steps={self.sample_num_steps} are 0 to "
                f"{self.sample_num_steps - 1}: let it end there, or sooner"
            )
        if self.num_trainable_steps < 1:
            remedy = "a larger sample_num_steps" + (" or a window that begins sooner" if self.sde_window else "")
            raise ValueError(
                f"sample_num_steps={self.sample_num_steps} with sde_window={self.sde_window} and "
                f"train_skip_last_steps={self.train_skip_last_steps:g} leaves no step with noise to train on: use "
                f"{'less train_skip_last_steps' if self.train_skip_last_steps else remedy}"
            )
        if self.num_train_timesteps < 1:
            raise ValueError(
                f"train_timestep_fraction is {self.train_timestep_fraction!r}: of {self.num_trainable_steps} steps "
                f"(sample_num_steps) it leaves no timestep to train on; use at least {1 / self.num_trainable_steps:g}"
            )
        images = self.sample_batch_size * self.sample_num_batches_per_epoch
        if images % self.sample_group_size:
            raise ValueError(
                f"sample_group_size is {self.sample_group_size}, but a process samples {images} images an epoch "
                "(sample_batch_size x sample_num_batches_per_epoch): use a divisor of that"
            )
        remembered, needed = self.per_prompt_stat_tracking_buffer_size, self.per_prompt_stat_tracking_min_count
        if self.per_prompt_stat_tracking and needed > remembered:
            raise ValueError(
                f"per_prompt_stat_tracking_min_count is {needed}, and with per_prompt_stat_tracking_buffer_size="
                f"{remembered} no prompt ever has so many rewards: lower it, or remember more"
            )
        updates = self.updates_per_inner_epoch * self.train_num_inner_epochs
        if self.objective == "ddpo_sf" and updates > 1:
            raise ValueError(
                f"objective is 'ddpo_sf', which holds for the policy that sampled, but an epoch has {updates} updates: "
                f"set train_gradient_accumulation_steps={images // self.train_batch_size} and "
                "train_num_inner_epochs=1, or use objective='ddpo_is'"
            )
        if problem := config_rules.conflict(self) or self.batch_size_problem() or package_rules.unknown_keyword(self):
            raise ValueError(problem)
        if problem := package_rules.missing_package(self):
            raise ImportError(problem)

    def to_dict(self) -> dict[str, Any]:
        """All fields, nested mappings flattened with `/` between the keys, as trackers want them."""
        return dict(_flattened(vars(self)))


def _flattened(mapping: dict[str, Any], prefix: str = "") -> Any:
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
