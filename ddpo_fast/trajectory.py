"""The samples that training reads, in three forms: trajectories, shuffled training batches, pairs of a UNet call.

Shapes: B images of a trajectory, b images of a training batch, T denoising steps, C H W latent, L tokens, D width of
the text embedding, N (image, timestep) pairs of a UNet call, M pairs of an index.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, repeat
from typing import Any, NamedTuple

import numpy as np
import torch


class _Keyed:
    """Lets fields be read as `sample["latents"]` too, because TRL's samples are dicts and its users' code expects that.

    `_views` names properties that can be read in the same way.
    """

    _views: tuple[str, ...] = ()

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self.keys() else default

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
    # with `train_image_credit`, one of the two
    credit: torch.Tensor | None = None  # [B, T], see image_credit.py
    features: torch.Tensor | None = None  # [B, T, F], see step_values.py
    advantages: torch.Tensor | None = None  # [B], or [B, T] if each step has its own
    # bool in the shape of `advantages`, on the CPU, so that the host can read it; None: all have one
    has_advantage: torch.Tensor | None = None

    _views = ("latents", "next_latents")

    @property
    def _tensors(self) -> list[str]:
        """The names of the tensors that sampling makes, all with a row for each image."""
        return [*_TENSORS, *(name for name in ("credit", "features") if self[name] is not None)]

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
        """One trajectory batch from several, in order and without advantages (a single one is returned as it is)."""
        if len(parts) == 1:
            return parts[0]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]._tensors}
        return cls(prompts=tuple(p for part in parts for p in part.prompts), **joined)

    def split(self, sizes: Sequence[int]) -> Iterator[Trajectory]:
        """Splits the images into parts of these `sizes`, in order. The parts are views, and have no advantages."""
        start = 0
        for size in sizes:
            rows = slice(start, start + size)
            parts = {name: self[name][rows] for name in self._tensors}
            yield Trajectory(prompts=self.prompts[rows], **parts)
            start += size

    def with_images(self, rows: Sequence[int], other: Trajectory, other_rows: Sequence[int]) -> Trajectory:
        """A copy whose images `rows` are the images `other_rows` of another trajectory."""
        prompts = list(self.prompts)
        for row, other_row in zip(rows, other_rows, strict=True):
            prompts[row] = other.prompts[other_row]
        device = self.trail.device
        at, source = (torch.tensor(numbers, device=device) for numbers in (rows, other_rows))
        replaced = {name: self[name].index_copy(0, at, other[name][source]) for name in self._tensors}
        return replace(self, prompts=tuple(prompts), **replaced)

    def with_advantages(self, advantages: torch.Tensor) -> Trajectory:
        """A copy that has the advantages of its images [B], or of their steps [B, T], given on the CPU."""
        differs = advantages != 0
        return replace(
            self,
            advantages=advantages.to(self.trail.device),
            has_advantage=None if differs.all() else differs,
        )

    def with_steps(self, steps: range) -> Trajectory:
        """The trajectory with the consecutive `steps` only; the tensors are views."""
        if len(steps) == self.timesteps.shape[1]:
            return self
        kept = slice(steps.start, steps.stop)
        fewer = {name: self[name][:, kept] for name in ("timesteps", "log_probs")}
        for name in ("credit", "features", "advantages", "has_advantage"):
            if self[name] is not None and self[name].dim() > 1:
                fewer[name] = self[name][:, kept]
        return replace(self, trail=self.trail[:, steps.start : steps.stop + 1], **fewer)

    def training_batch(
        self, rows: torch.Tensor, steps: torch.Tensor, has_advantage: torch.Tensor | None
    ) -> TrainingBatch:
        """The images `rows` [b], each with its steps in its own order, `steps` [b, T]."""
        assert self.advantages is not None, "training needs advantages: call with_advantages first"
        pick = rows[:, None], steps
        return TrainingBatch(
            prompt_embeds=self.prompt_embeds[rows],
            negative_prompt_embeds=self.negative_prompt_embeds[rows],
            timesteps=self.timesteps[pick],
            latents=self.latents[pick],
            next_latents=self.next_latents[pick],
            log_probs=self.log_probs[pick],
            advantages=_of_batch(self.advantages, rows, steps),
            has_advantage=has_advantage,
        )


def training_batches(trajectory: Trajectory, batch_size: int, inner_epochs: int) -> Iterator[Iterator[TrainingBatch]]:
    """For each inner epoch, all images in training batches of `batch_size`.

    Each inner epoch shuffles the images, and the steps of each image separately, starting from the order that the inner
    epoch before left. The permutations are drawn in TRL's order from the default generator of the trajectory's device.
    """
    device, (count, num_steps) = trajectory.timesteps.device, trajectory.timesteps.shape
    rows = torch.arange(count, device=device)
    steps = torch.arange(num_steps, device=device).expand(count, -1)
    for _ in range(inner_epochs):
        order = torch.randperm(count, device=device)
        rows, steps = rows[order], steps[order]
        steps = steps.gather(1, torch.stack([torch.randperm(num_steps, device=device) for _ in range(count)]))
        flags: Any = repeat(None)
        if trajectory.has_advantage is not None:
            flags = _of_batch(trajectory.has_advantage, rows.cpu(), steps.cpu()).split(batch_size)
        parts = zip(rows.split(batch_size), steps.split(batch_size), flags, strict=False)
        yield (trajectory.training_batch(*part) for part in parts)


def _of_batch(values: torch.Tensor, rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Those of the images `rows` [b], of `values` [B] of images, or of [B, T] of steps with `steps` [b, T] in order."""
    return values[rows[:, None], steps] if values.dim() > 1 else values[rows]


def of_pairs(values: torch.Tensor, rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Those of the pairs of images `rows` [N] and `steps` [N], of `values` [b] of images or [b, T] of steps."""
    return values[rows, steps] if values.dim() > 1 else values[rows]


_TENSORS = ["prompt_ids", "prompt_embeds", "negative_prompt_embeds", "timesteps", "trail", "log_probs"]


@dataclass(frozen=True, kw_only=True)
class TrainingBatch(_Keyed):
    """b images of a trajectory with their steps in shuffled order, copied from it when the batch is trained on."""

    prompt_embeds: torch.Tensor  # [b, L, D]
    negative_prompt_embeds: torch.Tensor  # [b, L, D]
    timesteps: torch.Tensor  # [b, T]
    latents: torch.Tensor  # [b, T, C, H, W]
    next_latents: torch.Tensor  # [b, T, C, H, W]
    log_probs: torch.Tensor  # [b, T]
    advantages: torch.Tensor  # [b] or, in the order of the steps, [b, T]
    has_advantage: torch.Tensor | None = None  # in the shape of `advantages`, on the CPU, as in `Trajectory`

    @classmethod
    def of(cls, batch: Any) -> TrainingBatch:
        """A training batch from a dict such as TRL's, whose keys are these fields; a `TrainingBatch` stays as it is."""
        if isinstance(batch, cls):
            return batch
        return cls(**{f.name: batch[f.name] for f in fields(cls) if f.name in batch})


def in_groups(batches: Iterable[Any], size: int) -> Iterator[list[TrainingBatch]]:
    """Yields training batches (or dicts such as TRL's) in groups of `size`: one group makes one update."""
    rest = iter(batches)
    while group := [TrainingBatch.of(batch) for batch in islice(rest, size)]:
        yield group


class Pairs(NamedTuple):
    """N (image, timestep) pairs, which one UNet call scores: the arguments of `DDPOTrainer.calculate_loss` in order."""

    latents: torch.Tensor  # [N, C, H, W]
    timesteps: torch.Tensor  # [N]
    next_latents: torch.Tensor  # [N, C, H, W]
    log_probs: torch.Tensor  # [N]
    advantages: torch.Tensor  # [N]
    embeds: torch.Tensor  # [N, L, D]; with guidance in training [2N, L, D], the negative prompts first

    @property
    def number(self) -> int:
        """N."""
        return len(self.timesteps)


def pair_index(batches: Sequence[TrainingBatch | Trajectory], num_steps: int) -> np.ndarray:
    """(batch, step, image) of the pairs of the first `num_steps` steps of training batches, [M, 3], on the host.

    TRL's order: batch by batch, in each the first step of every image, then the second.
    """
    counts = [len(batch.timesteps) for batch in batches]
    return np.array([(i, t, b) for i, count in enumerate(counts) for t in range(num_steps) for b in range(count)])


def pairs_of(batches: Sequence[TrainingBatch | Trajectory], index: np.ndarray, guided: bool) -> Pairs:
    """The pairs that rows of a `pair_index` name.

    Args:
        guided: whether training uses guidance, so that the embeddings include the negative prompts'.
    """
    parts: list[dict[str, torch.Tensor]] = []
    # `index` lists one batch after the other, so joining the batches' parts keeps its order
    for i in dict.fromkeys(index[:, 0].tolist()):
        mine = torch.from_numpy(index[index[:, 0] == i].T.copy())
        _, steps, rows = mine.to(batches[i].timesteps.device, non_blocking=True)
        per_step = {name: batches[i][name][rows, steps] for name in _PER_STEP}
        advantages = batches[i].advantages
        assert advantages is not None, "training needs advantages: call with_advantages first"
        per_step["advantages"] = of_pairs(advantages, rows, steps)
        parts.append({**per_step, **{name: batches[i][name][rows] for name in _PER_IMAGE}})
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    negative, prompts = found.pop("negative_prompt_embeds"), found.pop("prompt_embeds")
    return Pairs(**found, embeds=torch.cat([negative, prompts]) if guided else prompts)


_PER_STEP = ("latents", "timesteps", "next_latents", "log_probs")
_PER_IMAGE = ("prompt_embeds", "negative_prompt_embeds")
