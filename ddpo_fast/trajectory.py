"""What sampling leaves for training.

Shapes: B images, T denoising steps, C H W latent, L tokens, D width of the text embedding, N pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import repeat
from typing import Any

import numpy as np
import torch


class _Keyed:
    """Fields readable as `sample["latents"]` too: TRL's samples are dicts."""

    _views: tuple[str, ...] = ()

    def get(self, key: str) -> Any:
        return getattr(self, key) if key in self.keys() else None

    def keys(self) -> list[str]:
        return [f.name for f in fields(self)] + list(self._views)  # type: ignore[arg-type]

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)


@dataclass(frozen=True, kw_only=True)
class Trajectory(_Keyed):
    """A batch of denoising trajectories, in sampling order.

    The latents are fp32 and stored once: step t went from `trail[:, t]` to `trail[:, t + 1]`, and `log_probs[:, t]`
    is the log-density of exactly that stored value.
    """

    prompts: tuple[str, ...]  # B
    prompt_ids: torch.Tensor  # [B, L]
    prompt_embeds: torch.Tensor  # [B, L, D]
    negative_prompt_embeds: torch.Tensor  # [B, L, D]
    timesteps: torch.Tensor  # [B, T]
    trail: torch.Tensor  # [B, T + 1, C, H, W]
    log_probs: torch.Tensor  # [B, T]
    advantages: torch.Tensor | None = None  # [B]
    live: torch.Tensor | None = None  # [B] on the CPU: which images have an advantage; None: all

    _views = ("latents", "next_latents")

    @property
    def latents(self) -> torch.Tensor:
        """The latents before each step, [B, T, C, H, W]."""
        return self.trail[:, :-1]

    @property
    def next_latents(self) -> torch.Tensor:
        """The latents after each step, [B, T, C, H, W]."""
        return self.trail[:, 1:]

    @classmethod
    def cat(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """One trajectory batch from several, in order."""
        if len(parts) == 1:
            return parts[0]
        joined = {name: torch.cat([part[name] for part in parts]) for name in _TENSORS}
        return cls(prompts=tuple(p for part in parts for p in part.prompts), **joined)

    def split(self, sizes: Sequence[int]) -> Iterator[Trajectory]:
        """The trajectories of so many images each, in order; views of these."""
        start = 0
        for size in sizes:
            rows = slice(start, start + size)
            parts = {name: getattr(self, name)[rows] for name in _TENSORS}
            yield Trajectory(prompts=self.prompts[rows], **parts)
            start += size

    def with_advantages(self, advantages: torch.Tensor) -> Trajectory:
        """With the advantages of its images, [B] on the CPU."""
        live = advantages != 0
        return replace(self, advantages=advantages.to(self.trail.device), live=None if live.all() else live)

    def transitions(self, rows: torch.Tensor, steps: torch.Tensor, live: torch.Tensor | None) -> Transitions:
        """The steps `steps` [b, S] of the images `rows` [b], each image with its own order of steps."""
        assert self.advantages is not None, "transitions are for training: set advantages first"
        pick = rows[:, None], steps
        return Transitions(
            prompt_embeds=self.prompt_embeds[rows],
            negative_prompt_embeds=self.negative_prompt_embeds[rows],
            timesteps=self.timesteps[pick],
            latents=self.latents[pick],
            next_latents=self.next_latents[pick],
            log_probs=self.log_probs[pick],
            advantages=self.advantages[rows],
            live=live,
        )


def training_batches(trajectory: Trajectory, batch_size: int, inner_epochs: int) -> Iterator[Iterator[Transitions]]:
    """For each inner epoch, all transitions in batches of `batch_size` images.

    Each epoch shuffles the images, and every image's steps on their own. The shuffles compound and are drawn in TRL's
    order from the default generator of the trajectory's device.
    """
    device, (count, num_steps) = trajectory.timesteps.device, trajectory.timesteps.shape
    rows = torch.arange(count, device=device)
    steps = torch.arange(num_steps, device=device).expand(count, -1)
    for _ in range(inner_epochs):
        order = torch.randperm(count, device=device)
        rows, steps = rows[order], steps[order]
        steps = steps.gather(1, torch.stack([torch.randperm(num_steps, device=device) for _ in range(count)]))
        live = None if trajectory.live is None else trajectory.live[rows.cpu()].split(batch_size)
        parts = zip(rows.split(batch_size), steps.split(batch_size), live or repeat(None), strict=False)
        yield (trajectory.transitions(*part) for part in parts)


_TENSORS = ("prompt_ids", "prompt_embeds", "negative_prompt_embeds", "timesteps", "trail", "log_probs")


@dataclass(frozen=True, kw_only=True)
class Transitions(_Keyed):
    """A training batch: b images with S steps each, shuffled."""

    prompt_embeds: torch.Tensor  # [b, L, D]
    negative_prompt_embeds: torch.Tensor  # [b, L, D]
    timesteps: torch.Tensor  # [b, S]
    latents: torch.Tensor  # [b, S, C, H, W]
    next_latents: torch.Tensor  # [b, S, C, H, W]
    log_probs: torch.Tensor  # [b, S]
    advantages: torch.Tensor  # [b]
    live: torch.Tensor | None = None  # [b] on the CPU, as in `Trajectory`


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """N (image, timestep) pairs: what one UNet call scores."""

    prompt_embeds: torch.Tensor  # [N, L, D]
    negative_prompt_embeds: torch.Tensor  # [N, L, D]
    timesteps: torch.Tensor  # [N]
    latents: torch.Tensor  # [N, C, H, W]
    next_latents: torch.Tensor  # [N, C, H, W]
    log_probs: torch.Tensor  # [N]
    advantages: torch.Tensor  # [N]

    def __len__(self) -> int:
        return len(self.timesteps)

    def embeds(self, guided: bool) -> torch.Tensor:
        """The text embeddings of a UNet call: with guidance 2N rows, the negative prompts first."""
        return torch.cat([self.negative_prompt_embeds, self.prompt_embeds]) if guided else self.prompt_embeds


def pair_index(batches: Sequence[Any]) -> np.ndarray:
    """(batch, step, row) of all pairs of the training batches, [M, 3].

    TRL's order: batch by batch, in each the first step of every image, then the second. `batches` hold what
    `Transitions` hold (TRL's dicts do).
    """
    shapes = [batch["timesteps"].shape for batch in batches]
    return np.array([(i, t, b) for i, (rows, steps) in enumerate(shapes) for t in range(steps) for b in range(rows)])


def micro_batches(batches: Sequence[Any], index: np.ndarray, size: int) -> Iterator[Pairs]:
    """The pairs that a `pair_index` of the training batches names, in chunks of at most `size`."""
    for start in range(0, len(index), size):
        chunk = index[start : start + size]
        parts = []
        for i in dict.fromkeys(chunk[:, 0].tolist()):
            mine = torch.from_numpy(chunk[chunk[:, 0] == i].T.copy())
            _, steps, rows = mine.to(batches[i]["timesteps"].device, non_blocking=True)
            parts.append(_pairs(batches[i], rows, steps))
        yield Pairs(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Pairs)})


def _pairs(batch: Any, rows: torch.Tensor, steps: torch.Tensor) -> Pairs:
    per_image = {name: batch[name][rows] for name in ("prompt_embeds", "negative_prompt_embeds", "advantages")}
    per_step = {name: batch[name][rows, steps] for name in ("timesteps", "latents", "next_latents", "log_probs")}
    return Pairs(**per_image, **per_step)
