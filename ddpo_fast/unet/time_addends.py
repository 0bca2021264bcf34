"""What the residual blocks of a UNet add to their images, when the time embedding is projected for all of them at once.

N images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TimeAddends:
    """What each residual block adds to its images: `TogetherTimestepEmbedding` gives it in place of the embedding.

    Args:
        stacked: [N, sum of the blocks' widths], with the bias of each block's first convolution; N may be 1 for all
            images where nothing is trained.
        widths: the channels of each block.
        shared: how many blocks, the first ones, keep N rows where the rows of guidance share their first layers.
    """

    def __init__(self, stacked: Tensor, widths: Sequence[int], shared: int) -> None:
        self.stacked = stacked
        self.widths, self.shared = list(widths), shared
        self._first, self._others = stacked.split([sum(widths[:shared]), sum(widths[shared:])], dim=1)
        # as one op, whose gradient is one concatenation
        self._of_first = self._first.split(self.widths[:shared], dim=1)
        self.of_block = (*self._of_first, *self._others.split(self.widths[shared:], dim=1))
        self._twice: TimeAddends | None = None

    def __len__(self) -> int:
        return len(self.stacked)

    def for_rows(self, rows: int) -> TimeAddends:
        """These for `rows` images: if that is 2N, those of the blocks that are not `shared` get 2N rows, once."""
        if rows != 2 * len(self) or (len(self) == 1 and not self.stacked.requires_grad):
            return self
        if self._twice is None:
            twice = object.__new__(TimeAddends)
            others = torch.cat([self._others] * 2)
            vars(twice).update(vars(self))
            twice.of_block = (*self._of_first, *others.split(self.widths[self.shared :], dim=1))
            self._twice = twice
        return self._twice
