"""The mean reward of each epoch with the differences between prompts taken out.

An epoch's mean reward depends on which prompts were drawn, often by more than on what was learned. So an image's reward
is modelled as

    y = b_epoch + a_prompt + noise,    a ~ N(0, tau^2),  noise ~ N(0, sigma^2),

a mixed model with fixed effects b of epochs and random effects a of prompts. Its best linear unbiased estimates solve
Henderson's equations (Biometrics 31, 1975): with n images in all, n_e of an epoch, n_p of a prompt, n_ep of both,
lambda = sigma^2 / tau^2, and a eliminated,

    S b = sum_e - sum_p n_ep sum_p / (n_p + lambda),    S = diag(n_e) - n_ep diag(1 / (n_p + lambda)) n_ep^T,

sigma^2 is the variance within the images of an epoch and prompt; tau^2 is what the variance within epochs has beyond
it. Where no prompt repeats in an epoch, or prompts do not differ, b are the epochs' plain means.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Epochs that the model is fitted to. What a prompt's rewards differ by changes as the policy does.
REMEMBERED_EPOCHS = 16

Array = NDArray[np.float64]


class PromptLevels:
    """Remembers counts, sums and sums of squares of the rewards of each epoch and prompt."""

    def __init__(self) -> None:
        # by the epoch's number: prompt -> [count, mean, sum of squared distances from it]
        self._epochs: dict[int, dict[str, list[float]]] = {}
        self.added = 0

    def add(self, prompts: Sequence[str], rewards: Array, keep: Collection[int]) -> int:
        """Adds an epoch's rewards [images] and returns its number.

        Epochs are forgotten after `REMEMBERED_EPOCHS` further ones, except those whose numbers are in `keep`.
        """
        number, self.added = self.added, self.added + 1
        names = np.asarray(prompts, dtype=object)
        cells = {}
        for prompt in dict.fromkeys(prompts):
            mine = rewards[names == prompt]
            cells[prompt] = [float(len(mine)), float(mean := mine.mean()), float(((mine - mean) ** 2).sum())]
        self._epochs[number] = cells
        oldest = self.added - REMEMBERED_EPOCHS
        self._epochs = {n: cells for n, cells in self._epochs.items() if n >= oldest or n in keep}
        return number

    def fit(self) -> Fit:
        """The levels of the remembered epochs."""
        numbers, names = list(self._epochs), list(dict.fromkeys(p for cells in self._epochs.values() for p in cells))
        column = {prompt: i for i, prompt in enumerate(names)}
        # [epochs, prompts] each
        counts, means, squares = np.zeros((3, len(numbers), len(names)))
        for row, cells in enumerate(self._epochs.values()):
            for prompt, cell in cells.items():
                counts[row, column[prompt]], means[row, column[prompt]], squares[row, column[prompt]] = cell
        of_epoch, of_prompt = counts.sum(1), counts.sum(0)
        plain = (counts * means).sum(1) / of_epoch
        within_cells = _variance(squares.sum(), counts.sum() - (counts > 0).sum())
        between = counts * (means - plain[:, None]) ** 2
        within_epochs = _variance(squares.sum() + between.sum(), counts.sum() - len(numbers))
        of_prompts = within_epochs - within_cells
        if within_cells <= 0 or of_prompts <= 0:
            return Fit(numbers, plain, within_epochs / of_epoch)
        # 1 / (n_p + lambda)
        shrunk = 1 / (of_prompt + within_cells / of_prompts)
        spread = np.linalg.inv(np.diag(of_epoch) - (counts * shrunk) @ counts.T)
        sums = counts * means
        levels = spread @ (sums.sum(1) - counts @ (shrunk * sums.sum(0)))
        return Fit(numbers, levels, within_epochs / of_epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"added": self.added, "epochs": [[number, cells] for number, cells in self._epochs.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.added = state["added"]
        self._epochs = {number: dict(cells) for number, cells in state["epochs"]}


class Fit:
    """The levels of epochs, by number, and the squared errors of their plain means."""

    def __init__(self, numbers: Sequence[int], levels: Array, squared_errors: Array) -> None:
        self._rows = {number: row for row, number in enumerate(numbers)}
        self._levels, self._squared_errors = levels, squared_errors

    def level(self, epochs: Sequence[int]) -> float:
        """The mean level of some epochs."""
        return float(self._weights(epochs) @ self._levels)

    def error(self, epochs: Sequence[int], others: Sequence[int]) -> float:
        """The standard error of the difference between the plain means of some epochs and of others.

        It is larger than that of the levels, as the prompts' differences are in it. A policy's level goes up and down
        from update to update, and a fall of a few errors of the level is often made up for by the next ones.
        """
        return float(np.sqrt(sum(self._weights(part) ** 2 @ self._squared_errors for part in (epochs, others))))

    def _weights(self, epochs: Sequence[int]) -> Array:
        weights = np.zeros(len(self._levels))
        weights[[self._rows[epoch] for epoch in epochs]] = 1 / len(epochs)
        return weights


def _variance(squares: float, freedom: float) -> float:
    return squares / freedom if freedom > 0 else 0.0
