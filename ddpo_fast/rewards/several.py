"""The weighted sum of several rewards, each in units of its own spread.

    reward = sum over the parts of  weight * (r - origin) / std

std is a part's standard deviation over all images of the run so far, those of the present epoch included; origin is its
mean in the first epoch. A part whose numbers are large then counts as much as one whose numbers are small. The origin
stays, as a moving one would make rewards of different epochs incomparable: per-prompt statistics and `train_guard`
compare them, and within an epoch it changes nothing. Where a run has images of several sizes, these are those of the
images of one size.

The sum can only be formed when all images of an epoch, on all processes, have been scored. The trainer does so.

Shapes: B images, N images of all processes, K rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import as_completed
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from ddpo_fast.by_size import BySize
from ddpo_fast.rewards.scoring import PartFailed, RewardFunction, score
from ddpo_fast.worker_threads import WorkerThreads

# a spread below this share of the values is rounding of fp32
ROUNDING = 1e-6


class RunningSpread:
    """Mean and standard deviation of all values so far, which come in groups (Chan, Golub and LeVeque, 1979)."""

    def __init__(self) -> None:
        self.count = 0
        # `squares` is the sum of squared distances from the mean; `origin` is the mean of the first group
        self.mean = self.squares = self.origin = 0.0

    def add(self, values: np.ndarray) -> None:
        """Adds values [N], of which there is at least one."""
        values = values.astype(np.float64)
        mean, total = float(values.mean()), self.count + len(values)
        if self.count == 0:
            self.origin = mean
        distance = mean - self.mean
        self.squares += float(np.square(values - mean).sum()) + distance**2 * self.count * len(values) / total
        self.mean += distance * len(values) / total
        self.count = total

    @property
    def std(self) -> float:
        """The standard deviation; infinity for values that differ by no more than rounding."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > ROUNDING * abs(self.mean) else math.inf

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = int(state["count"])
        self.mean, self.squares, self.origin = (float(state[name]) for name in ("mean", "squares", "origin"))


class SeveralRewards:
    """A reward function that is a weighted sum of others; `ddpo_fast.rewards.load` makes it from their names.

    Called by itself it returns the sum of the parts as they are, without statistics, so that images from before and
    after training can be compared. Its metadata has each part's rewards, [B] in fp32 on the CPU, in 'components' and
    what the parts returned beside them in 'metadata'. `DDPOTrainer` trains on `weighted` components.

    Args:
        parts: reward functions by name.
        weights: of each part; negative for what is to be lowered.
        normalize: whether the parts are added in units of their spread; else they are added as they are.
        in_threads: names of parts that compute side by side, each in a thread of its own; the others compute one after
            the other in the thread that calls, meanwhile.

    Raises `PartFailed` with the part's name if one raises, or returns what cannot be trained on. The other parts then
    finish what they have begun, so that their processes and networks can be used again.
    """

    def __init__(
        self,
        parts: Mapping[str, RewardFunction],
        weights: Mapping[str, float],
        normalize: bool = True,
        in_threads: Collection[str] = (),
    ) -> None:
        self.parts, self.weights, self.normalize = dict(parts), dict(weights), normalize
        # by itself a part gains nothing from a thread
        self.in_threads = [name for name in self.parts if name in in_threads and len(self.parts) > 1]
        self._was_called = False
        self._by_size = BySize(lambda: {name: RunningSpread() for name in self.parts})

    @property
    def spreads(self) -> dict[str, RunningSpread]:
        """The statistics of each part, of images of the present size."""
        return self._by_size.now

    def use_size(self, size: str) -> None:
        """Takes the statistics of images of this size from here on; see `BySize`."""
        self._by_size.use(size)

    @classmethod
    def of(cls, function: RewardFunction, name: str) -> SeveralRewards:
        """`function` itself if it is of this class, else the only part, called `name`."""
        return function if isinstance(function, cls) else cls({name: function}, {name: 1.0})

    def __call__(
        self, images: torch.Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        place = _SamePlace(images)

        def scored(name: str) -> tuple[torch.Tensor, Any]:
            try:
                rewards, info = score(self.parts[name], images, prompts, metadata, called=f"reward {name!r}")
            except (RuntimeError, ValueError) as error:
                raise PartFailed(str(error)) from error
            # parts may compute on different devices
            return rewards.cpu(), info

        here = [name for name in self.parts if name not in self.in_threads]
        # Libraries patch themselves while they load a network, so that two must not be loaded at the same time: ours
        # take turns, and at its first call a user's function may load one.
        found = {} if self._was_called else {name: scored(name) for name in here}
        threads = WorkerThreads(len(self.in_threads), "part")
        begun = {name: threads.submit(place.call, scored, name) for name in self.in_threads}
        try:
            found |= {name: scored(name) for name in here if name not in found}
            for part in as_completed(begun.values()):
                part.result()
        finally:
            threads.shutdown(wait=False)
        self._was_called = True
        found |= {name: part.result() for name, part in begun.items()}
        components, infos = ({name: found[name][i] for name in self.parts} for i in (0, 1))
        return self._sum(components, normalize=False), {"components": components, "metadata": infos}

    def observe(self, components: Mapping[str, np.ndarray]) -> None:
        """Adds an epoch's components [N] of all processes to the statistics, which all processes then share."""
        for name, spread in self.spreads.items():
            spread.add(components[name])

    def weighted(self, components: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The rewards [B] to train on, in fp32 on the CPU, of components [B] of images that `observe` has counted."""
        return self._sum(components, self.normalize)

    def _sum(self, components: Mapping[str, torch.Tensor], normalize: bool) -> torch.Tensor:
        total = torch.zeros(())
        for name, weight in self.weights.items():
            values = components[name].double()
            if normalize:
                values = (values - self.spreads[name].origin) / self.spreads[name].std
            total = total + weight * values
        return total.float()

    # checkpoints keep the statistics and the state of the parts

    def state_dict(self) -> dict[str, Any]:
        return {
            "spreads": self._by_size.packed(
                lambda spreads: {name: spread.state_dict() for name, spread in spreads.items()}
            ),
            "parts": {name: part.state_dict() for name, part in self._stateful().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what is known of each part; one that the state does not have begins anew."""
        self._by_size.unpack(state.get("spreads", {}), self._spreads_of)
        for name, part in self._stateful().items():
            if name in state.get("parts", {}):
                part.load_state_dict(state["parts"][name])

    def _spreads_of(self, packed: dict[str, Any]) -> dict[str, RunningSpread]:
        spreads = {name: RunningSpread() for name in self.parts}
        for name in spreads.keys() & packed.keys():
            spreads[name].load_state_dict(packed[name])
        return spreads

    def _stateful(self) -> dict[str, Any]:
        return {name: p for name, p in self.parts.items() if hasattr(p, "state_dict") and hasattr(p, "load_state_dict")}


class _SamePlace:
    """Where a thread computes: with its number of CPU threads, and on a GPU on the images' and in its stream.

    New threads have torch's defaults for these. Other sums of other numbers of threads would have other bits, and
    another stream would not wait for the images.
    """

    def __init__(self, images: Any) -> None:
        self.threads = torch.get_num_threads()
        is_on_gpu = isinstance(images, torch.Tensor) and images.is_cuda
        self.stream = torch.cuda.current_stream(images.device) if is_on_gpu else None

    def call(self, function: Callable[[str], Any], name: str) -> Any:
        """`function(name)` in another thread, as in the one that made this."""
        torch.set_num_threads(self.threads)
        stream: AbstractContextManager[Any] = nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        with stream:
            return function(name)
