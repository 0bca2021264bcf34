"""One update of the weights: which pairs it needs, their losses and gradients, and what is logged about them.

Shapes: N pairs in a UNet call, C H W latent, L tokens, D width of the text embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpo_fast import ops
from ddpo_fast.config import DDPOConfig
from ddpo_fast.cuda_graphs import Recorded
from ddpo_fast.engine import Engine
from ddpo_fast.metrics import UpdateMetrics
from ddpo_fast.trajectory import Pairs, micro_batches, pair_index

# A look costs a forward pass, a third of a pair's work, and saves all three thirds of a dead one: it pays from a third
# on, and fewer may be dead than in the epoch before.
LOOKING_PAYS = 0.5

# (latents [N, C, H, W], timesteps [N], embeds [N or 2N, L, D]) -> the UNet's output
UNetOutput = Callable[[Tensor, Tensor, Tensor], Tensor]
# (latents, timesteps, next latents, old log-probs, advantages, embeds) -> (loss, approximate KL, clip fraction)
Loss = Callable[..., tuple[Tensor, Tensor, Tensor]]


class PPO:
    """Updates by the clipped loss of `ops.ppo_loss`, whose gradient goes straight into the UNet's backward pass.

    Args:
        unet_output: calls the UNet.
        table: the noise schedule's.
    """

    def __init__(
        self,
        config: DDPOConfig,
        engine: Engine,
        device: torch.device,
        unet_output: UNetOutput,
        table: Callable[[], Tensor],
    ) -> None:
        self.config = config
        self.engine = engine
        self.unet_output = unet_output
        self.table = table
        self.metrics = UpdateMetrics()
        self._recorded = Recorded(self._learn, engine.zero_gradients) if config.cuda_graphs else None
        # cuDNN plans each number of rows anew, which takes longer than the rows do
        self.zero = torch.zeros((), device=device)
        self.fills_up = device.type == "cuda"

    def add_gradients(
        self,
        batches: Sequence[Any],
        micro_batch_size: int,
        looks_first: bool = False,
        own_loss: Loss | None = None,
    ) -> None:
        """Adds the gradient of the pairs of training batches, for `step`.

        Args:
            looks_first: score all pairs without a graph and then train on those that have a gradient. The gradient is
                the same; the host waits for the device once.
            own_loss: somebody's objective in place of `ops.ppo_loss`; it is given all pairs.
        """
        self.metrics = UpdateMetrics()
        every = pair_index(batches)
        if own_loss is not None:
            self._learn_own(own_loss, micro_batches(batches, every, micro_batch_size), len(every))
        else:
            self._learn_live(batches, every, micro_batch_size, looks_first)

    def step(self) -> dict[str, Tensor]:
        """One optimizer step; its metrics and those of the pairs, still on the device."""
        return {**self.metrics.means(), **self.engine.step()}

    def forget_recordings(self) -> None:
        """Frees what graphs of micro-batches keep; they are recorded again when they are needed."""
        if self._recorded is not None:
            self._recorded.forget()

    def _learn_own(self, own_loss: Loss, parts: Iterable[Pairs], total: int) -> None:
        for pairs in parts:
            share = len(pairs) / total
            loss, approx_kl, clipfrac = own_loss(*self._operands(pairs))
            self.engine.backward(loss * share)
            self.metrics.add(share, loss=loss, approx_kl=approx_kl, clipfrac=clipfrac)

    def _learn_live(self, batches: Sequence[Any], every: np.ndarray, size: int, looks_first: bool) -> None:
        """Adds the gradients of all pairs, from those that have one as far as that is known."""
        zero = self.zero
        scored = index = _with_advantage(batches, every) if self.config.train_skip_dead_pairs else every
        # the losses of the others are zero; whatever else is logged is of those that were scored
        self.metrics.add(1.0, loss=zero, approx_kl=zero, clipfrac=zero, dead=zero)
        self.metrics.at_least("ratio_drift", zero)
        if looks_first:
            index = scored[self._look(batches, scored, size, len(every))]
        for pairs, count in self._calls(batches, index, size, len(every)):
            found = self._learn_from(pairs, len(pairs) / len(every), len(pairs) == size)
            if not looks_first:
                self._note(pairs, count, len(every), len(scored), *found)
        for output in self._passes_for_others(batches, len(index), size):
            self.engine.loss_scale()
            self.engine.backward_from(output, torch.zeros_like(output))
        self.metrics.add(1.0, skipped=zero + (1 - len(index) / len(every)))

    def _look(self, batches: Sequence[Any], index: np.ndarray, size: int, total: int) -> np.ndarray:
        """Which pairs have a gradient, [M]."""
        dead = []
        with torch.no_grad():
            for pairs, count in self._calls(batches, index, size, total):
                _, scored = self._score(*self._operands(pairs))
                dead.append(self._note(pairs, count, total, len(index), *_logged(scored)))
            for _ in self._passes_for_others(batches, len(index), size):
                pass
        return ~torch.cat(dead).cpu().numpy() if dead else np.zeros(0, dtype=bool)

    def _calls(self, batches: Sequence[Any], index: np.ndarray, size: int, total: int) -> Iterator[tuple[Pairs, int]]:
        """The pairs of each UNet call for an `index` into `total`, and how many of them it is made for.

        Where some were left out the last call has any size, and the next update's another one. With `fills_up` it has a
        power of two or `size`: its last pair is repeated with an advantage of zero, so with neither loss nor gradient.
        """
        for start in range(0, len(index), size):
            chunk = index[start : start + size]
            count = len(chunk)
            rows = min(size, 1 << (count - 1).bit_length()) if self.fills_up and len(index) < total else count
            (pairs,) = micro_batches(batches, np.concatenate([chunk, chunk[-1:].repeat(rows - count, axis=0)]), rows)
            pairs.advantages[count:] = 0
            yield pairs, count

    def _passes_for_others(self, batches: Sequence[Any], count: int, size: int) -> Iterator[Tensor]:
        """Outputs of passes that this process does not need, and that others need its share of the weights for."""
        mine = -(-count // size)
        for _ in range(self.engine.forward_passes(mine) - mine):
            (pairs,) = micro_batches(batches, pair_index(batches)[:1], 1)
            latents, timesteps, *_, embeds = self._operands(pairs)
            yield self.unet_output(latents, timesteps, embeds)

    def _learn_from(self, pairs: Pairs, share: float, is_full: bool) -> Sequence[Tensor]:
        scale = self.engine.loss_scale().to(pairs.latents.dtype) * share
        learn = self._recorded if self._recorded is not None and is_full else self._learn
        return learn(*self._operands(pairs), scale)

    def _learn(self, *operands: Tensor) -> Sequence[Tensor]:
        """Adds the gradient of pairs, times the last of the operands."""
        output, scored = self._score(*operands)
        self.engine.backward_from(output, scored.gradient)
        return _logged(scored)

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
        output = self.unet_output(latents, timesteps, embeds)
        scored = ops.ppo_loss(
            output.detach(),
            latents,
            next_latents,
            log_probs,
            advantages,
            self.table(),
            timesteps,
            self.config.sample_guidance_scale if self.config.guides_training else None,
            clip_range=self.config.train_clip_range,
            advantage_limit=self.config.train_adv_clip_max,
            grad_scale=scale,
        )
        return output, scored

    def _operands(self, pairs: Pairs) -> tuple[Tensor, ...]:
        """Pairs as `Loss` takes them."""
        embeds = pairs.embeds(self.config.guides_training)
        return pairs.latents, pairs.timesteps, pairs.next_latents, pairs.log_probs, pairs.advantages, embeds

    def _note(
        self,
        pairs: Pairs,
        count: int,
        total: int,
        scored: int,
        loss: Tensor,
        approx_kl: Tensor,
        clipfrac: Tensor,
        ratio_drift: Tensor,
        log_probs: Tensor,
    ) -> Tensor:
        """Adds the first `count` pairs of a call to the metrics; which of them have no gradient, [count].

        They are some of the update's `total` pairs and of those that are `scored`; the call's others only fill it up.
        """
        edge = self.config.train_clip_range
        change, advantages = (log_probs - pairs.log_probs)[:count], pairs.advantages[:count]
        ratio = torch.exp(change)
        dead = torch.where(advantages > 0, ratio > 1 + edge, ratio < 1 - edge) | (advantages == 0)
        if count < len(pairs):
            approx_kl = 0.5 * change.square().mean()
            clipfrac = ((ratio - 1).abs() > edge).float().mean()
        # a mean over the call's pairs, of which those that fill it up add nothing
        self.metrics.add(len(pairs) / total, loss=loss)
        self.metrics.add(count / scored, approx_kl=approx_kl, clipfrac=clipfrac, dead=dead.float().mean())
        self.metrics.at_least("ratio_drift", ratio_drift)
        return dead


def _logged(scored: ops.PPOLoss) -> tuple[Tensor, ...]:
    return scored.loss, scored.approx_kl, scored.clip_fraction, scored.ratio_drift, scored.log_probs


def _with_advantage(batches: Sequence[Any], index: np.ndarray) -> np.ndarray:
    """The pairs of a `pair_index` whose images have an advantage, as far as the host knows."""
    live = np.ones(len(index), dtype=bool)
    for i, batch in enumerate(batches):
        if batch.get("live") is not None:
            mine = index[:, 0] == i
            live[mine] = batch["live"].numpy()[index[mine, 2]]
    return index[live]
