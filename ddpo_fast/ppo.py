"""One update of the weights: the pairs that it needs, their gradients, and what to do when memory runs out.

Shapes: N (image, timestep) pairs in a UNet call, C H W latent, L tokens, D width of the text embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpo_fast import ops
from ddpo_fast.batch_sizes import BatchSizes
from ddpo_fast.config import DDPOConfig
from ddpo_fast.cuda_graphs import Recorded
from ddpo_fast.device_memory import is_out_of_memory
from ddpo_fast.engine import Engine
from ddpo_fast.metrics import UpdateMetrics, approx_kl, clip_fraction
from ddpo_fast.policy import Policy
from ddpo_fast.trajectory import Pairs, TrainingBatch, Trajectory, pair_index, pairs_of

logger = logging.getLogger(__name__)

# Scoring all pairs first, to train only on those with a gradient, costs each a forward pass: a third of a pair's work,
# as a backward pass takes twice a forward one. It saves all of the work of a pair without a gradient, so it pays from a
# third of them on; half is asked for, as there may be fewer than in the epoch before.
SCORING_FIRST_PAYS = 0.5

# the arguments of `Pairs`, in order -> (loss, approximate KL, clip fraction)
Objective = Callable[..., tuple[Tensor, Tensor, Tensor]]


class CallMetrics(NamedTuple):
    """What one UNet call says of its pairs: scalars, and `log_probs` [N]."""

    loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    ratio_drift: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, scored: ops.PPOLoss) -> CallMetrics:
        return cls(scored.loss, scored.approx_kl, scored.clip_fraction, scored.ratio_drift, scored.log_probs)


class PPO:
    """Updates by the clipped loss of `ops.ppo_loss`, whose gradient goes straight into the UNet's backward pass.

    The loss's gradient with respect to the UNet's output is known in closed form, so the forward pass computes it and
    there is no autograd graph between the output and the loss.

    Args:
        sizes: says how many pairs a UNet call has.

    Raises `ValueError` where `optimizer_in_backward` is set and an update takes more than one UNet call.
    """

    def __init__(self, config: DDPOConfig, policy: Policy, engine: Engine, sizes: BatchSizes) -> None:
        self.config = config
        self.policy = policy
        self.engine = engine
        self.sizes = sizes
        self.metrics = UpdateMetrics()
        calls = -(-config.pairs_per_update // sizes.micro_batch_size) if config.optimizer_in_backward else 1
        if calls > 1:
            raise ValueError(
                f"optimizer_in_backward is True, but an update takes {calls} UNet calls, and it must be one: leave it "
                "out, or make updates smaller"
            )
        # share of pairs without a gradient in each update of this epoch so far, and of the one before
        self.zero_gradient_shares: list[float] = []
        self._shares_before: list[float] = []
        self._recorded = Recorded(self._add_gradient, engine.zero_gradients) if config.cuda_graphs else None
        # cuDNN plans its convolutions anew for each number of rows, which takes longer than a few rows more
        self.pads_last_call = policy.device.type == "cuda"

    def begin_epoch(self) -> None:
        """The next updates train on new samples."""
        self.zero_gradient_shares, self._shares_before = [], self.zero_gradient_shares

    def remember(self, shares: Sequence[float]) -> None:
        """The shares of pairs without a gradient in the updates since the last call, alike on every process."""
        self.zero_gradient_shares += shares

    def update(self, batches: Sequence[TrainingBatch], number: int, objective: Objective | None) -> dict[str, Tensor]:
        """One optimizer step from the first `num_train_timesteps` steps of training batches.

        Args:
            number: the update's number in its epoch, from 0.
            objective: the user's own loss, which is given all pairs; None for `ops.ppo_loss`.

        Returns its metrics, [] each, still on the device. Raises `RuntimeError` if memory runs out and a smaller
        micro-batch cannot help.
        """
        while True:
            try:
                self._add_gradients(batches, number, objective)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error)
            # after the `except`, as the error's traceback keeps the tensors of the call that failed
            self._halve_micro_batch(problem)
        found = {**self.metrics.means(), **self.engine.step()}
        if number > 0:
            # the ratio's distance from 1 is an error only while the weights are still those that sampled
            found.pop("ratio_drift", None)
        return found

    @torch.no_grad()
    def score_again(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory with the log-probs that training's forward pass gives it under the current weights."""
        index, size = pair_index([trajectory], trajectory.timesteps.shape[1]), self.sizes.micro_batch_size
        log_probs = []
        with self.engine.computing():
            for start in range(0, len(index), size):
                pairs = pairs_of([trajectory], index[start : start + size], self.config.guides_training)
                log_probs.append(self.policy.log_prob(pairs.latents, pairs.timesteps, pairs.next_latents, pairs.embeds))
        # pairs are in order of the step, then of the image
        by_step = torch.cat(log_probs).reshape(trajectory.log_probs.T.shape)
        return replace(trajectory, log_probs=by_step.T.contiguous())

    def _halve_micro_batch(self, problem: str) -> None:
        """Makes UNet calls smaller for good, and forgets the gradients of the update that has to begin again."""
        size = self.sizes.micro_batch_size
        if not self.engine.can_begin_again or not self.sizes.halve():
            raise RuntimeError(
                f"out of memory with a micro-batch of {size}: set a smaller train_micro_batch_size, "
                f"gradient_checkpointing='blocks', train_use_8bit_adam or offload='optimizer' ({problem})"
            )
        if self._recorded is not None:
            # a recorded graph keeps its activations
            self._recorded.forget()
        self.engine.zero_gradients()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory: micro-batches of %d instead of %d from here on", self.sizes.micro_batch_size, size
        )

    # the gradient of an update

    def _add_gradients(self, batches: Sequence[TrainingBatch], number: int, objective: Objective | None) -> None:
        self.metrics = UpdateMetrics()
        index = pair_index(batches, self.config.num_train_timesteps)
        if objective is None:
            self._add_clipped(batches, index, number)
        else:
            self._add_objective(batches, index, objective)

    def _add_clipped(self, batches: Sequence[TrainingBatch], index: np.ndarray, number: int) -> None:
        """Adds the gradient of the clipped loss, by UNet calls for the pairs that have one as far as that is known."""
        total, size = len(index), self.sizes.micro_batch_size
        # Pairs of images without an advantage have neither loss nor gradient, and the host knows them.
        if self.config.train_skip_dead_pairs:
            index = _with_advantage(batches, index)
        scored = len(index)
        # Every process logs the same metrics, also one without any pair.
        nothing = torch.zeros((), device=self.policy.device)
        self.metrics.add(1.0, loss=nothing, approx_kl=nothing, clipfrac=nothing, zero_gradient=nothing)
        self.metrics.at_least("ratio_drift", nothing)
        # Pairs that the clip leaves without a gradient are known only after a forward pass, here one without a graph.
        scores_first = self._scores_first(number)
        if scores_first:
            index = index[self._has_gradient(batches, index, total)]
        for pairs, count in self._calls(batches, index, total):
            # the loss is a mean over the update's pairs, and fp16's loss scale keeps its gradient from underflow
            scale = self.engine.loss_scale().to(pairs.latents.dtype) * (pairs.number / total)
            add: Callable[..., Any] = self._add_gradient
            if self._recorded is not None and pairs.number == size:
                add = self._recorded
            call = CallMetrics(*add(*pairs, scale))
            if not scores_first:
                self._measure(pairs, count, total, scored, call)
        # Where weights are split over processes, every process makes as many passes as the one with the most pairs.
        for output in self._passes_for_others(batches, index):
            self.engine.loss_scale()
            self.engine.backward_from(output, torch.zeros_like(output))
        self.metrics.add(1.0, skipped=nothing + (1 - len(index) / total))

    def _add_objective(self, batches: Sequence[TrainingBatch], index: np.ndarray, objective: Objective) -> None:
        """Adds the gradient of the user's own loss, which may give pairs without an advantage one: all are used."""
        for pairs, _ in self._calls(batches, index, len(index)):
            share = pairs.number / len(index)
            loss, kl, clipfrac = objective(*pairs)
            self.engine.backward(loss * share)
            self.metrics.add(share, loss=loss, approx_kl=kl, clipfrac=clipfrac)

    def _scores_first(self, number: int) -> bool:
        """Whether so many pairs had no gradient in this update of the last epoch that finding them first pays."""
        shares = self._shares_before[number : number + 1]
        return self.config.train_skip_dead_pairs and any(share > SCORING_FIRST_PAYS for share in shares)

    @torch.no_grad()
    def _has_gradient(self, batches: Sequence[TrainingBatch], index: np.ndarray, total: int) -> np.ndarray:
        """Which pairs have a gradient, [M]; the host waits for the device once."""
        without = []
        for pairs, count in self._calls(batches, index, total):
            _, scored = self._score(*pairs)
            without.append(self._measure(pairs, count, total, len(index), CallMetrics.of(scored)))
        for _ in self._passes_for_others(batches, index):
            pass
        return ~torch.cat(without).cpu().numpy() if without else np.zeros(0, dtype=bool)

    def _calls(self, batches: Sequence[TrainingBatch], index: np.ndarray, total: int) -> Iterator[tuple[Pairs, int]]:
        """The pairs of each UNet call for an `index` of some of an update's pairs, and how many are not padding.

        Where pairs were left out the last call has any number of them, and the next update's another one. With
        `pads_last_call` it has a power of two or a whole micro-batch: the last pair is repeated with an advantage of
        zero, so without loss and gradient.
        """
        size = self.sizes.micro_batch_size
        for start in range(0, len(index), size):
            chunk = index[start : start + size]
            count = len(chunk)
            if self.pads_last_call and len(index) < total:
                rows = min(size, 1 << (count - 1).bit_length())
                chunk = np.concatenate([chunk, chunk[-1:].repeat(rows - count, axis=0)])
            pairs = pairs_of(batches, chunk, self.config.guides_training)
            pairs.advantages[count:] = 0
            yield pairs, count

    def _passes_for_others(self, batches: Sequence[TrainingBatch], index: np.ndarray) -> Iterator[Tensor]:
        """Outputs of forward passes that this process does not need, and others need its share of the weights for."""
        mine = -(-len(index) // self.sizes.micro_batch_size)
        for _ in range(self.engine.forward_passes(mine) - mine):
            pairs = pairs_of(batches, pair_index(batches, 1)[:1], self.config.guides_training)
            yield self.policy.output(pairs.latents, pairs.timesteps, pairs.embeds)

    # one UNet call

    def _add_gradient(self, *pairs_and_scale: Tensor) -> CallMetrics:
        """Adds the gradient of `Pairs`, times a scale []. A CUDA graph may replay it, so all are tensors."""
        output, scored = self._score(*pairs_and_scale)
        self.engine.backward_from(output, scored.gradient)
        return CallMetrics.of(scored)

    def _score(
        self,
        latents: Tensor,
        timesteps: Tensor,
        next_latents: Tensor,
        log_probs: Tensor,
        advantages: Tensor,
        embeds: Tensor,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, ops.PPOLoss]:
        """The UNet's output for pairs, with its graph, and the loss with its gradient with respect to that output."""
        output = self.policy.output(latents, timesteps, embeds)
        scored = ops.ppo_loss(
            output.detach(),
            latents,
            next_latents,
            log_probs,
            advantages,
            self.policy.noise_table,
            timesteps,
            self.config.sample_guidance_scale if self.config.guides_training else None,
            clip_range=self.config.train_clip_range,
            advantage_limit=self.config.train_adv_clip_max,
            grad_scale=scale,
        )
        return output, scored

    def _measure(self, pairs: Pairs, count: int, total: int, scored: int, call: CallMetrics) -> Tensor:
        """Adds a UNet call to the metrics; returns which of its pairs have no gradient, [count].

        The loss is a mean over the update's `total` pairs, as those that were left out have a loss of zero. The other
        metrics are over the pairs that are `scored`. Only the first `count` pairs of the call are not padding.
        """
        clip_range = self.config.train_clip_range
        new, old, advantages = call.log_probs[:count], pairs.log_probs[:count], pairs.advantages[:count]
        ratio = torch.exp(new - old)
        without = ops.is_clipped(advantages, clip_range, ratio) | (advantages == 0)
        kl, clipfrac = call.approx_kl, call.clip_fraction
        if count < pairs.number:
            kl, clipfrac = approx_kl(new, old), clip_fraction(ratio, clip_range)
        self.metrics.add(pairs.number / total, loss=call.loss)
        self.metrics.add(count / scored, approx_kl=kl, clipfrac=clipfrac, zero_gradient=without.float().mean())
        self.metrics.at_least("ratio_drift", call.ratio_drift)
        return without


def _with_advantage(batches: Sequence[TrainingBatch], index: np.ndarray) -> np.ndarray:
    """The rows of a `pair_index` whose images have an advantage, as far as the host knows."""
    keep = np.ones(len(index), dtype=bool)
    for i, batch in enumerate(batches):
        if batch.has_advantage is not None:
            mine = index[:, 0] == i
            keep[mine] = batch.has_advantage.numpy()[index[mine, 2]]
    return index[keep]
