"""What follows from the settings of a run: steps, rows, pairs, images and updates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

from ddpo_fast.config_rules import pixels

# (height, width) of images in pixels; None for a side of the model's own
Size: TypeAlias = tuple[int | None, int | None]


class ConfigNumbers:
    """The derived numbers of a `DDPOConfig`, which has the fields that are read here."""

    # Set by `processes.with_launch_settings` where `accelerate launch` was given settings for DeepSpeed and the config
    # has none.
    launched_with_deepspeed = False
    # Set by `families.with_family` for models that differ in them from Stable Diffusion.
    guides_by_rows = True
    last_step_has_noise = True
    is_flow_matching = False

    if TYPE_CHECKING:
        # all that is read here are fields of `DDPOConfig`
        def __getattr__(self, name: str) -> Any: ...

    def batch_size_problem(self, num_processes: int = 1) -> str:
        """A sentence about batch sizes that do not divide each other as they must, or '' (TRL's `_config_check`)."""
        sample, train = self.sample_batch_size, self.train_batch_size
        samples_per_epoch = sample * num_processes * self.sample_num_batches_per_epoch
        per_update = train * num_processes * self.train_gradient_accumulation_steps
        if sample < train:
            return f"Sample batch size ({sample}) must be greater than or equal to the train batch size ({train})"
        if sample % train:
            return f"Sample batch size ({sample}) must be divisible by the train batch size ({train})"
        if samples_per_epoch % per_update:
            return (
                f"Number of samples per epoch ({samples_per_epoch}) must be divisible by the total train batch size "
                f"({per_update})"
            )
        return ""

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed trains: because of `zero`, `deepspeed`, or the settings of `accelerate launch`."""
        return self.zero > 0 or self.deepspeed is not None or self.launched_with_deepspeed

    @property
    def image_sizes(self) -> list[Size]:
        """The sizes of images, which epochs have by turns; evaluations and images of fixed noise have the first."""
        return [(self.height, self.width)] if self.sizes is None else [pixels(size) for size in self.sizes]

    @property
    def largest_size(self) -> Size:
        """The size that takes the most memory."""
        return self.image_sizes[0] if self.sizes is None else max(map(pixels, self.sizes), key=math.prod)

    def size_of(self, epoch: int) -> Size:
        """The size of the images of an epoch, counted from 0."""
        return self.image_sizes[epoch % len(self.image_sizes)]

    def size_name(self, epoch: int) -> str:
        """The size of an epoch's images in words, as what is only compared within a size is kept by; '' with one."""
        return "" if self.sizes is None else self.sizes[epoch % len(self.sizes)]

    @property
    def trainable_steps(self) -> range:
        """The denoising steps that may be trained, counted from 0.

        They are those with noise (see `sde_window`), but for the last ones that `train_skip_last_steps` leaves out.
        """
        steps = self.sample_num_steps
        first, last = (0, steps - 1) if self.sde_window is None else self.sde_window
        kept = steps - round(steps * self.train_skip_last_steps)
        return range(first, min(last + 1, kept, steps if self.last_step_has_noise else steps - 1))

    @property
    def num_trainable_steps(self) -> int:
        """Denoising steps that may be trained."""
        return len(self.trainable_steps)

    @property
    def num_train_timesteps(self) -> int:
        """Timesteps of each image that an inner epoch trains on, rounded down."""
        return int(self.num_trainable_steps * self.train_timestep_fraction)

    @property
    def guides_training(self) -> bool:
        """Whether training uses classifier-free guidance; a `sample_guidance_scale` of 1 or less means none."""
        return self.train_cfg and self.rows_per_image == 2

    @property
    def rows_per_image(self) -> int:
        """Rows of the UNet's batch for an image in sampling: 2 with guidance (negative prompt and prompt), else 1."""
        return 2 if self.sample_guidance_scale > 1 and self.guides_by_rows else 1

    @property
    def rows_per_pair(self) -> int:
        """Rows of the UNet's batch for an (image, timestep) pair in training: 2 with guidance, else 1."""
        return 2 if self.guides_training else 1

    def batch_arithmetic(self, num_processes: int = 1) -> str:
        """How many images, (image, timestep) pairs and updates an epoch has, in three lines for a person."""
        images = self.sample_batch_size * self.sample_num_batches_per_epoch * num_processes
        per_update = self.train_batch_size * self.train_gradient_accumulation_steps * num_processes
        updates = self.updates_per_inner_epoch * self.train_num_inner_epochs
        processes = "" if num_processes == 1 else f" x {num_processes} processes"
        return (
            f"{images} images per epoch ({self.sample_num_batches_per_epoch} batches of {self.sample_batch_size}"
            f"{processes}), {self.sample_num_steps} denoising steps each\n"
            f"{per_update * self.num_train_timesteps} (image, timestep) pairs per update "
            f"({per_update} images x {self.num_train_timesteps} timesteps), "
            f"{self.train_micro_batch_size or 'as many as fit'} per UNet call\n"
            f"{updates} update{'s' * (updates != 1)} per epoch, {self.num_epochs} epochs: "
            f"{images * self.num_epochs} images, {updates * self.num_epochs} updates"
        )

    @property
    def updates_per_inner_epoch(self) -> int:
        """Optimizer steps in one pass over an epoch's samples; the number of processes does not change it."""
        images = self.sample_batch_size * self.sample_num_batches_per_epoch
        return images // (self.train_batch_size * self.train_gradient_accumulation_steps)

    @property
    def num_updates(self) -> int:
        """Optimizer steps of a run of `num_epochs` epochs."""
        return self.num_epochs * self.train_num_inner_epochs * self.updates_per_inner_epoch

    @property
    def pairs_per_update(self) -> int:
        """(image, timestep) pairs that make one update on a process."""
        return self.train_batch_size * self.train_gradient_accumulation_steps * self.num_train_timesteps
