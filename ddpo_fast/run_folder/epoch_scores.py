"""How good the weights were after each epoch: which checkpoint is the best, and whether a run still improves."""

from __future__ import annotations

from collections.abc import Iterable


class EpochScores:
    """The score of the weights after each number of whole epochs, higher is better.

    Args:
        held_out: whether scores are those of evaluations, which reward functions that are not trained on give to fixed
            prompts and noise. Else they are the mean rewards of the images that the weights were trained on next.
    """

    def __init__(self, held_out: bool) -> None:
        self.held_out = held_out
        self._of: dict[int, float] = {}

    @property
    def kind(self) -> str:
        """What the scores are, in words."""
        return "held-out reward" if self.held_out else "training reward"

    def add(self, epochs: int, score: float) -> None:
        self._of[epochs] = score

    def best(self, among: Iterable[int] | None = None) -> int | None:
        """The number of epochs with the highest score, the earliest of equal ones; None if no score is known.

        Args:
            among: which numbers of epochs to choose from; None for all.
        """
        known = self._of if among is None else [epochs for epochs in among if epochs in self._of]
        return max(sorted(known), key=self._of.__getitem__, default=None)

    def score(self, epochs: int) -> float:
        return self._of[epochs]

    def epochs_without_gain(self) -> int:
        """Epochs between the best score and the last one."""
        best = self.best()
        return 0 if best is None else max(self._of) - best

    def state_dict(self) -> list[list[float]]:
        return [[epochs, score] for epochs, score in self._of.items()]

    def load_state_dict(self, state: list[list[float]]) -> None:
        self._of = {int(epochs): score for epochs, score in state}
