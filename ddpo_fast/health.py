"""Checks that a run still learns: samples, rewards and updates are finite, varied, and near the policy that sampled.

Shapes: B images of a batch, T denoising steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ddpo_fast.config import DDPOConfig
from ddpo_fast.trajectory import Trajectory
from ddpo_fast.warning_limits import FAR_LOG_RATIO, FIRST_EPOCHS, LEAST_VARIETY

logger = logging.getLogger(__name__)

# A log-ratio is the mean over a latent's elements of (z_old^2 - z^2) / 2, where z is the distance from the Gaussian's
# mean in standard deviations. If that mean has moved by 20 standard deviations, the log-ratio is about -20^2 / 2: the
# policy has nothing left of the one that sampled.
LARGEST_LOG_RATIO = 20**2 / 2
# the remedy in several messages
HALF_PRECISION = "a higher mixed_precision ('bf16' or 'no')"


class RunStopped(RuntimeError):
    """Raised when a run cannot go on, as its numbers are not finite or are meaningless. Its checkpoints are older."""


class SampleHealth:
    """Checks that an epoch's samples are finite and that not all images are equal.

    The flags are computed on the device with each batch and read once, by `check`: reading each flag when it is
    computed would make the host wait for the device in the middle of sampling.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Trajectory, torch.Tensor]] = []
        self._all_finite: list[torch.Tensor] = []
        self._same: list[torch.Tensor] = []
        self._first: torch.Tensor | None = None
        self._images = 0

    @torch.no_grad()
    def add(self, trajectory: Trajectory, images: Any) -> None:
        """Adds a batch of trajectories and their images [B, 3, height, width]; skips one whose images are no tensor."""
        if not isinstance(images, torch.Tensor):
            return
        for part in (trajectory.trail, trajectory.log_probs, images):
            self._all_finite.append(part.isfinite().all())
        if self._first is None:
            self._first = images[:1].clone()
        self._same.append((images == self._first).all())
        self._images += len(images)
        self._batches.append((trajectory, images))

    def check(self) -> None:
        """Raises `RunStopped` for a sample that is not finite, naming its prompt, and if all images are equal.

        Waits for the device.
        """
        if self._all_finite and not bool(torch.stack(self._all_finite).all()):
            for trajectory, images in self._batches:
                _check_batch(trajectory, images)
        if self._images > 1 and bool(torch.stack(self._same).all()):
            raise RunStopped(
                f"all {self._images} images of the epoch are the same, to the last pixel, so there is nothing to learn "
                "from: the model has collapsed; lower train_learning_rate and go on from an earlier checkpoint"
            )


def _check_batch(trajectory: Trajectory, images: torch.Tensor) -> None:
    steps = trajectory.log_probs.shape[1]
    for what, fine in (
        ("latents", trajectory.trail.isfinite().flatten(2).all(2).cpu()),
        ("log-probability", trajectory.log_probs.isfinite().cpu()),
    ):
        if not fine.all():
            step = int((~fine).any(0).nonzero()[0])
            image = int((~fine[:, step]).nonzero()[0])
            # latents 0 are the initial noise and latents i come from step i, but log-prob i is of step i + 1
            step += what == "log-probability"
            raise RunStopped(
                f"the {what} of an image of {trajectory.prompts[image]!r} stopped being finite at denoising step "
                f"{step} of {steps}: the model overflows in this precision, or its weights have diverged; use "
                f"{HALF_PRECISION}, or lower train_learning_rate and go on from an earlier checkpoint"
            )
    fine = images.isfinite().flatten(1).all(1).cpu()
    if not fine.all():
        image = int((~fine).nonzero()[0])
        raise RunStopped(not_finite(trajectory.prompts[image]))


def not_finite(prompt: str) -> str:
    """The message for an image whose pixels are not finite although its latents are."""
    return (
        f"the image of {prompt!r} has pixels that are not finite, though its latents are: the VAE overflows in this "
        f"precision; use {HALF_PRECISION} or a VAE made for fp16"
    )


def check_images(images: torch.Tensor, prompts: Sequence[str], latents: torch.Tensor) -> None:
    """Raises `RunStopped` for the first of `images` [B, ...] or their `latents` [B, ...] that is not finite."""
    for parts, told in ((latents, latents_not_finite), (images, not_finite)):
        fine = parts.isfinite().flatten(1).all(1)
        if not fine.all():
            raise RunStopped(told(prompts[int((~fine).nonzero()[0])]))


def latents_not_finite(prompt: str) -> str:
    """The message for an image whose latents are not finite."""
    return (
        f"the latents of the image of {prompt!r} are not finite: the model's weights are damaged, or overflow in this "
        f"precision; use {HALF_PRECISION}, copy the model again, or go on from an earlier checkpoint"
    )


def check_weights(weights: dict[str, torch.Tensor], epochs: int) -> None:
    """Raises `RunStopped` if trained weights are not finite, so that they are never saved as a good checkpoint.

    Args:
        epochs: whole epochs so far, for the message.
    """
    if not weights:
        return
    # the largest absolute value of each tensor, which is finite only if all are, in a few launches for all tensors
    largest = torch.stack([norm.double() for norm in torch._foreach_norm(list(weights.values()), math.inf)])
    if not bool(largest.isfinite().all()):
        name = list(weights)[int((~largest.isfinite()).nonzero()[0])]
        raise RunStopped(
            f"weights of {name} are not finite after {epochs} epochs: they are not saved; lower train_learning_rate "
            "and go on from the last checkpoint"
        )


class Health:
    """Checks an epoch's rewards and updates by numbers that the host reads for the log in any case.

    Args:
        speaks: whether this process logs warnings, each kind of problem once.
        clip_range: range of the ratio's clip (default: the config's `train_clip_range`).
    """

    def __init__(self, config: DDPOConfig, speaks: bool = True, clip_range: float | None = None) -> None:
        self.config = config
        self.speaks = speaks
        self.clip_range = config.train_clip_range if clip_range is None else clip_range
        # of the present images, or '' where all have one size
        self.size = ""
        self.good = True
        # `reward_spread` and `image_spread` of the first epochs, by name and size, which checkpoints keep
        self.first_spreads: dict[str, list[float]] = {}
        self._warned: set[str] = set()

    def begin_epoch(self) -> None:
        """An epoch counts as good until a problem is found in it; checkpoints record that."""
        self.good = True

    def rewards(self, epoch: int, values: np.ndarray) -> None:
        """Warns if all rewards [images] are equal: then all advantages are zero, and nothing is learned."""
        if len(values) > 1 and float(np.ptp(values)) == 0:
            self._warn(
                "spread",
                f"all {len(values)} rewards of epoch {epoch + 1} are {float(values[0]):g}: without spread there is "
                "nothing to learn; see what the reward function returns, and whether the images still differ",
            )

    def variety(self, epoch: int, spreads: dict[str, float]) -> None:
        """Warns if the spread of rewards or of images has fallen far below that of the first epochs."""
        for name, spread in spreads.items():
            if name not in ("reward_spread", "image_spread"):
                continue
            first = self.first_spreads.setdefault(f"{name} of {self.size}" if self.size else name, [])
            if len(first) < FIRST_EPOCHS:
                first.append(spread)
            elif spread < LEAST_VARIETY * sum(first) / len(first):
                what = "images" if name == "image_spread" else "rewards"
                bounded = self.config.train_target_update > 0
                slower = "a smaller train_target_update" if bounded else "a smaller train_learning_rate"
                self._warn(
                    name,
                    f"the {what} of a prompt differ by {spread:.2g} in epoch {epoch + 1} ({name}), and by "
                    f"{sum(first) / len(first):.2g} at the start: the policy loses its variety and may be collapsing; "
                    f"go on from an earlier checkpoint with {slower}, or with train_kl_weight",
                )

    def update(self, number: int, info: dict[str, float], folder: Any) -> None:
        """Raises `RunStopped` for an update whose numbers show a broken run, and warns of one that may lead there."""
        rescue = f"lower train_learning_rate and resume from the last checkpoint in {folder}"
        if not math.isfinite(info["loss"]):
            raise RunStopped(f"the loss of update {number} is {info['loss']}: {rescue}")
        # The scale is halved after each overflow. It falls below 1 only if gradients exceed fp16 even without scaling.
        if info.get("loss_scale", 1.0) < 1.0:
            raise RunStopped(
                f"update {number} overflowed at a loss scale of {info['loss_scale']:g}: {rescue}, or use bf16"
            )
        if not math.isfinite(info.get("grad_norm", 0.0)) and not info.get("skipped_step"):
            raise RunStopped(f"the gradient of update {number} is {info['grad_norm']}: {rescue}")
        if "approx_kl" in info:
            self._ratios(number, info, rescue)

    def _ratios(self, number: int, info: dict[str, float], rescue: str) -> None:
        """Raises or warns where the policy is too far from the one that sampled; only some objectives measure it."""
        # approx_kl is half the mean square of the log-ratio, so this is the log-ratio's root mean square
        log_ratio = math.sqrt(2 * info["approx_kl"]) if info["approx_kl"] >= 0 else math.inf
        if not log_ratio < LARGEST_LOG_RATIO:
            raise RunStopped(
                f"before update {number} the policy has diverged from the one that sampled (approx_kl "
                f"{info['approx_kl']:.1e}): {rescue}"
            )
        if log_ratio > max(FAR_LOG_RATIO, 10 * self.clip_range):
            self._warn(
                "kl",
                f"before update {number} the policy is far from the one that sampled (approx_kl "
                f"{info['approx_kl']:.1e}; the clip range is {self.clip_range:g}): lower "
                "train_learning_rate or train_num_inner_epochs",
            )
        elif info.get("clipfrac", 0.0) > 0.999:
            self._warn(
                "clip",
                f"in update {number} all ratios are outside of the clip range of {self.clip_range:g}, so "
                "that hardly anything is learned: lower train_learning_rate, or raise train_clip_range",
                good=True,
            )

    def _warn(self, kind: str, text: str, good: bool = False) -> None:
        self.good = self.good and good
        if self.speaks and kind not in self._warned:
            self._warned.add(kind)
            logger.warning(text)
