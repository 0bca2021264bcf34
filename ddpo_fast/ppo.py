"""One optimizer update: its pairs, their gradient in micro-batches, and smaller micro-batches when memory runs out.

Shapes: N (image, timestep) pairs in a UNet call, M pairs of an update, C H W latent, L tokens, D width of the text
embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpo_fast.batch_sizes import BatchSizes
from ddpo_fast.bounded_update import MEASURED_PAIRS, BoundedUpdate
from ddpo_fast.config import DDPOConfig
from ddpo_fast.cuda_graphs import Recorded
from ddpo_fast.device_memory import is_out_of_memory
from ddpo_fast.engine import Engine
from ddpo_fast.metrics import UpdateMetrics
from ddpo_fast.objectives import Objective, Scored
from ddpo_fast.policy import Policy
from ddpo_fast.spatial_credit import spatially_credited
from ddpo_fast.trajectory import Pairs, TrainingBatch, Trajectory, of_pairs, pair_index, pairs_of

logger = logging.getLogger(__name__)

# The share of an update's pairs without a gradient from which scoring all pairs first saves time. Scoring costs each
# pair one forward pass. It saves forward and backward pass, together about three forward passes, of each pair without a
# gradient: so it pays above a third. The limit is a half because the share is taken from the epoch before, and may be
# smaller in this one.
SCORING_FIRST_PAYS = 0.5

# takes the fields of `Pairs` in order, returns the scalars (loss, approximate KL, clip fraction)
OwnLoss = Callable[..., tuple[Tensor, Tensor, Tensor]]
# metrics that are maxima over pairs and not means
MAXIMA = frozenset({"ratio_drift"})


class Call(NamedTuple):
    """What is kept of a UNet call of N pairs: scalars [], and `log_probs` [N]."""

    loss: Tensor
    log_probs: Tensor
    metrics: tuple[Tensor, ...]  # in the order of `Objective.metrics`


class PPO:
    """Updates the weights by the gradient of an objective.

    The gradient of its loss with respect to the UNet's output is known in closed form. The UNet's backward pass starts
    from it, so that there is no autograd graph between the output and the loss.

    Args:
        sizes: says how many pairs a UNet call has.
        objective: what is minimised.
        bound: keeps updates near `train_target_update`; None to leave them alone.

    Raises `ValueError` where `optimizer_in_backward` is set and an update takes more than one UNet call.
    """

    def __init__(
        self,
        config: DDPOConfig,
        policy: Policy,
        engine: Engine,
        sizes: BatchSizes,
        objective: Objective,
        bound: BoundedUpdate | None = None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.engine = engine
        self.sizes = sizes
        self.objective = objective
        self.bound = bound
        self.metrics = UpdateMetrics()
        calls = -(-config.pairs_per_update // sizes.micro_batch_size) if config.optimizer_in_backward else 1
        if calls > 1:
            raise ValueError(
                f"optimizer_in_backward is True, but an update takes {calls} UNet calls, and it must be one: leave it "
                "out, or make updates smaller"
            )
        # the share of pairs without a gradient, by update: in this epoch so far, and in the epoch before
        self.zero_gradient_shares: list[float] = []
        self._shares_before: list[float] = []
        self._recorded = Recorded(self._add_gradient, engine.zero_gradients) if config.cuda_graphs else None
        # cuDNN chooses algorithms anew for each new batch size, which takes longer than a few rows of padding
        self.pads_last_call = policy.device.type == "cuda"

    def begin_epoch(self) -> None:
        """To be called before an epoch's first update: the shares so far become those of the epoch before."""
        self.zero_gradient_shares, self._shares_before = [], self.zero_gradient_shares

    def remember(self, shares: Sequence[float]) -> None:
        """Keeps the share of pairs without a gradient in each update since the last call.

        They must be the same on every process, as all processes decide by them whether to score pairs first.
        """
        self.zero_gradient_shares += shares

    def update(self, batches: Sequence[TrainingBatch], number: int, own_loss: OwnLoss | None) -> dict[str, Tensor]:
        """Takes one optimizer step on the first `num_train_timesteps` steps of the images of training batches.

        Args:
            number: the update's number in its epoch, from 0.
            own_loss: the user's own loss; None for the objective's.

        Returns the update's metrics, [] each, on the device. Raises `RuntimeError` if memory runs out and the
        micro-batch cannot be made smaller.
        """
        if self.bound is not None:
            self.bound.begin(self._measured_calls(batches))
        while True:
            try:
                self._add_gradients(batches, number, own_loss)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error)
            # Outside of the `except`: while the error exists, its traceback keeps the failed call's tensors in memory.
            self._halve_micro_batch(problem)
        if self.bound is None:
            found = {**self.metrics.means(), **self.engine.step()}
        else:
            found = {**self.metrics.means(), **self.engine.step(self.bound.settle), **self.bound.metrics}
        if number > 0:
            # Before the first update the weights are those that sampled, and a ratio other than 1 is a numerical error.
            # Later ratios differ from 1 because the weights do.
            found.pop("ratio_drift", None)
        return found

    def _measured_calls(self, batches: Sequence[TrainingBatch]) -> list[Pairs]:
        """Some pairs of an update, evenly spaced over its images and steps, in UNet calls of at most a micro-batch."""
        index = pair_index(batches, self.config.num_train_timesteps)
        chosen = index[np.linspace(0, len(index) - 1, min(MEASURED_PAIRS, len(index))).round().astype(int)]
        return [pairs for pairs, _ in self._calls(batches, chosen, len(chosen))]

    @torch.no_grad()
    def score_again(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory with the log-probs that training's forward pass gives it under the current weights."""
        index = pair_index([trajectory], trajectory.timesteps.shape[1])
        with self.engine.computing():
            log_probs = [
                self.policy.log_prob(pairs.latents, pairs.timesteps, pairs.next_latents, pairs.embeds)
                for pairs, _ in self._calls([trajectory], index, len(index))
            ]
        # pairs are in order of the step, then of the image: [T * B] -> [T, B], then transposed to [B, T]
        by_step = torch.cat(log_probs).reshape(trajectory.log_probs.T.shape)
        return replace(trajectory, log_probs=by_step.T.contiguous())

    def _halve_micro_batch(self, problem: str) -> None:
        """Halves the micro-batch for the rest of the run, and discards the gradients of the update, which starts again.

        Raises `RuntimeError` with `problem` if the micro-batch is one pair already, or the update cannot start again.
        """
        size = self.sizes.micro_batch_size
        if not self.engine.can_begin_again or not self.sizes.halve():
            raise RuntimeError(
                f"out of memory with a micro-batch of {size}: set a smaller train_micro_batch_size, "
                f"gradient_checkpointing='blocks', train_use_8bit_adam or offload='optimizer' ({problem})"
            )
        if self._recorded is not None:
            # a recorded CUDA graph keeps the memory of its activations allocated
            self._recorded.forget()
        self.engine.zero_gradients()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory: micro-batches of %d instead of %d from here on", self.sizes.micro_batch_size, size
        )

    # the gradient of an update

    def _add_gradients(self, batches: Sequence[TrainingBatch], number: int, own_loss: OwnLoss | None) -> None:
        """Adds an update's gradient in UNet calls of micro-batches, and collects its metrics."""
        self.metrics = UpdateMetrics()
        index = pair_index(batches, self.config.num_train_timesteps)
        if own_loss is None:
            self._add_objective(batches, index, number)
        else:
            self._add_own(batches, index, own_loss)

    def _add_objective(self, batches: Sequence[TrainingBatch], index: np.ndarray, number: int) -> None:
        """Adds the objective's gradient. Pairs that are known to have none are left out of the UNet calls."""
        total, size = len(index), self.sizes.micro_batch_size
        # Pairs whose advantage is 0 have neither loss nor gradient. The host knows them without asking the device.
        if self.objective.skips:
            index = _with_advantage(batches, index)
        scored = len(index)
        # Metrics are averaged over processes: each needs all of them, also one that has no pair left.
        nothing = torch.zeros((), device=self.policy.device)
        self.metrics.add(1.0, loss=nothing)
        self._add_metrics(1.0, dict.fromkeys(self.objective.metrics, nothing))
        self.metrics.add(1.0, zero_gradient=nothing)
        # Which pairs the clip leaves without a gradient is known only from their ratio: a forward pass, without an
        # autograd graph, computes it.
        scores_first = self._scores_first(number)
        if scores_first:
            index = index[self._has_gradient(batches, index, total)]
        for pairs, count in self._calls(batches, index, total):
            # The objective's loss is a mean over a call's pairs, and the update's loss one over all `total` pairs. The
            # loss scale keeps gradients in fp16 from underflow; it is 1 in other precisions.
            scale = self.engine.loss_scale().to(pairs.latents.dtype) * (pairs.number / total)
            add: Callable[..., Any] = self._add_gradient
            if self._recorded is not None and pairs.number == size:
                add = self._recorded
            loss, log_probs, *metrics = add(*pairs, scale)
            if not scores_first:
                self._measure(pairs, count, total, scored, Call(loss, log_probs, tuple(metrics)))
        # Under ZeRO's stages 2 and 3 a pass exchanges gradients or weights with all processes, so all must make as many
        # passes as the one with the most pairs. A gradient of zero changes nothing.
        for output in self._passes_for_others(batches, index):
            self.engine.loss_scale()
            self.engine.backward_from(output, torch.zeros_like(output))
        self.metrics.add(1.0, skipped=nothing + (1 - len(index) / total))

    def _add_own(self, batches: Sequence[TrainingBatch], index: np.ndarray, own_loss: OwnLoss) -> None:
        """Adds the gradient of the user's own loss, from all pairs: it may have one where the advantage is 0."""
        for pairs, _ in self._calls(batches, index, len(index)):
            share = pairs.number / len(index)
            loss, kl, clipfrac = own_loss(*pairs)
            self.engine.backward(loss * share)
            self.metrics.add(share, loss=loss, approx_kl=kl, clipfrac=clipfrac)

    def _scores_first(self, number: int) -> bool:
        """Whether to score all pairs before training on those with a gradient.

        Decided by the share of pairs without one in the update of the same number of the epoch before.
        """
        shares = self._shares_before[number : number + 1]
        return self.objective.skips and any(share > SCORING_FIRST_PAYS for share in shares)

    @torch.no_grad()
    def _has_gradient(self, batches: Sequence[TrainingBatch], index: np.ndarray, total: int) -> np.ndarray:
        """Which pairs of `index` have a gradient, [M] bool, by forward passes; the host waits for the device once."""
        without = []
        for pairs, count in self._calls(batches, index, total):
            _, scored = self._score(pairs)
            call = Call(scored.loss, scored.log_probs, tuple(scored.metrics.values()))
            without.append(self._measure(pairs, count, total, len(index), call))
        for _ in self._passes_for_others(batches, index):
            pass
        return ~torch.cat(without).cpu().numpy() if without else np.zeros(0, dtype=bool)

    def _calls(
        self, batches: Sequence[TrainingBatch | Trajectory], index: np.ndarray, total: int
    ) -> Iterator[tuple[Pairs, int]]:
        """Yields the pairs of each UNet call, and how many of them are not padding.

        Args:
            index: rows of a `pair_index`, some or all of the update's `total` pairs.

        Where pairs were left out, the last call has a number of pairs that differs from update to update. With
        `pads_last_call` the last pair is then repeated up to a power of two, or a whole micro-batch. The copies have an
        advantage of 0, so neither loss nor gradient.
        """
        size = self.sizes.micro_batch_size
        for start in range(0, len(index), size):
            chunk = index[start : start + size]
            count = len(chunk)
            if self.pads_last_call and len(index) < total:
                # the smallest power of two that is at least `count`
                rows = min(size, 1 << (count - 1).bit_length())
                chunk = np.concatenate([chunk, chunk[-1:].repeat(rows - count, axis=0)])
            pairs = pairs_of(batches, chunk, self.config.guides_training)
            pairs.advantages[count:] = 0
            yield pairs, count

    def _passes_for_others(self, batches: Sequence[TrainingBatch], index: np.ndarray) -> Iterator[Tensor]:
        """Yields the outputs of forward passes that only serve other processes, which have more pairs than this one.

        They need this process's share of the weights or gradients in each of their passes.
        """
        mine = -(-len(index) // self.sizes.micro_batch_size)
        for _ in range(self.engine.forward_passes(mine) - mine):
            pairs = pairs_of(batches, pair_index(batches, 1)[:1], self.config.guides_training)
            yield self.policy.output(pairs.latents, pairs.timesteps, pairs.embeds)

    # one UNet call

    def _add_gradient(self, *pairs_and_scale: Tensor) -> tuple[Tensor, ...]:
        """Adds the gradient of `Pairs`, times a scale []. A CUDA graph may replay it, so it takes and returns tensors.

        Returns the fields of a `Call`, its metrics one by one.
        """
        *pairs, scale = pairs_and_scale
        output, scored = self._score(Pairs(*pairs), scale)
        self.engine.backward_from(output, spatially_credited(scored.gradient, self.config.spatial_credit))
        return scored.loss, scored.log_probs, *scored.metrics.values()

    def _score(self, pairs: Pairs, scale: Tensor | None = None) -> tuple[Tensor, Scored]:
        """The UNet's output for pairs, with its autograd graph, and the loss with its gradient by that output."""
        operands = pairs.latents, pairs.timesteps, pairs.embeds
        # before the policy's own call, see `Reference.output`
        reference = None if self.objective.reference is None else self.objective.reference.output(*operands)
        output = self.policy.output(*operands)
        if self.config.train_pool_latents > 1:
            # the gradient by the pooled output; autograd spreads it over the pixels
            pooled = self.policy.pooled
            output, reference = pooled(output), None if reference is None else pooled(reference)
            pairs = pairs._replace(latents=pooled(pairs.latents), next_latents=pooled(pairs.next_latents))
        return output, self.objective.score(output.detach(), reference, pairs, scale)

    def _measure(self, pairs: Pairs, count: int, total: int, scored: int, call: Call) -> Tensor:
        """Adds a UNet call to the metrics; returns which of its pairs have no gradient, [count] bool.

        The loss is a mean over the update's `total` pairs, as pairs without an advantage have a loss of zero. The other
        metrics are means over the `scored` pairs, which the UNet is called for. The pairs of the call after the first
        `count` are padding.
        """
        timesteps, old, advantages = (part[:count] for part in (pairs.timesteps, pairs.log_probs, pairs.advantages))
        real = pairs._replace(timesteps=timesteps, log_probs=old, advantages=advantages)
        log_probs = call.log_probs[:count]
        without = self.objective.without_gradient(real, log_probs)
        metrics = dict(zip(self.objective.metrics, call.metrics, strict=True))
        if count < pairs.number:
            # the means of the call include the padding; its maxima may, as padding repeats a pair
            metrics |= self.objective.means_of(real, log_probs)
        self.metrics.add(pairs.number / total, loss=call.loss)
        self._add_metrics(count / scored, metrics)
        self.metrics.add(count / scored, zero_gradient=without.float().mean())
        return without

    def _add_metrics(self, share: float, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            if name in MAXIMA:
                self.metrics.add_maximum(name, value)
            else:
                self.metrics.add(share, **{name: value})


def _with_advantage(batches: Sequence[TrainingBatch], index: np.ndarray) -> np.ndarray:
    """The rows of a `pair_index` except those whose advantage is known to be 0 (`has_advantage`)."""
    keep = np.ones(len(index), dtype=bool)
    for i, batch in enumerate(batches):
        if batch.has_advantage is not None:
            mine = index[:, 0] == i
            steps, rows = torch.from_numpy(index[mine, 1:].T)
            keep[mine] = of_pairs(batch.has_advantage, rows, steps).numpy()
    return index[keep]
