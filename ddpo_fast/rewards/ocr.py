"""How much of a prompt's quoted text an image shows, as read by optical character recognition."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ddpo_fast.rewards.optional_packages import require_packages
from ddpo_fast.rewards.pixels import as_uint8

QUOTES = '"“”„‟«»'
# the orders of more texts than these are too many to try
MAX_ORDERED = 5


class TextShown:
    """How much of the text in double quotes in the prompt the image shows.

    The score of an image is `1 - min(d, n) / n`, from 0 to 1. Here `n` is the length of the text and `d` its
    Levenshtein distance from all that is read in the image; both are in lower case and without spaces. Text in the
    image beyond what the prompt asks for lowers the score, so that an image full of letters gains nothing. A prompt's
    several quoted texts count as one, in the order that fits the image best (of more than five, in the prompt's). An
    image without text has the score 0.

    An image's metadata may be a dict whose key "text" has the text, or a list of texts, instead of the prompt's quotes.

    Source: the reward of Flow-GRPO (arXiv 2505.05470), without its exception for text that contains the target.
    Recognition: `rapidocr` (Apache-2.0) with the weights of PP-OCRv6 small in its wheel, on the CPU, upright text only;
    for finding text, an image's longer side is reduced to 256 px.
    """

    def __init__(self) -> None:
        require_packages("ocr", "ocr", "rapidocr", "onnxruntime", "rapidfuzz")
        self._reader: Any = None
        # one call at a time: a reader keeps its present settings and models in itself
        self._lock = threading.Lock()

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[torch.Tensor, dict[str, list[str]]]:
        """The scores [B], and under "read" what was read in each image.

        Raises `ValueError` for a prompt without quoted text, and for images with NaN.
        """
        targets = [target_texts(prompt, info) for prompt, info in zip(prompts, metadata, strict=True)]
        read = self._read(as_uint8(images))
        return torch.tensor([text_score(*pair) for pair in zip(read, targets, strict=True)]), {"read": read}

    def _read(self, pixels: np.ndarray) -> list[str]:
        """All text in each of the images [B, H, W, 3], its lines joined from top to bottom."""
        with self._lock:
            if self._reader is None:
                from rapidocr import RapidOCR

                settings = {"Det.limit_side_len": 256, "Det.limit_type": "max", "Global.use_cls": False}
                self._reader = RapidOCR(params={**settings, "Global.log_level": "critical"})
            # it takes arrays as OpenCV has them, blue first; `txts` is None if no text was found
            results = [self._reader(np.ascontiguousarray(image[:, :, ::-1])) for image in pixels]
        return [" ".join(result.txts or ()) for result in results]


def target_texts(prompt: str, metadata: Any) -> list[str]:
    """The texts that an image of the prompt should show: its metadata's "text", else what the prompt has in quotes.

    Raises `ValueError` if there is none, or a quotation mark without its other half.
    """
    if isinstance(metadata, dict) and "text" in metadata:
        given = metadata["text"]
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(
                f'the metadata\'s "text" is {given!r} but must be a text or a list of texts ({prompt!r:.200})'
            )
    else:
        parts = re.split(f"[{QUOTES}]", prompt)
        # parts outside and inside of quotes take turns, and the last is outside
        if len(parts) % 2 == 0:
            raise ValueError(
                f"reward 'ocr' finds an odd number of quotation marks: give \"text\" as metadata: {prompt!r:.200}"
            )
        texts = parts[1::2]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(
            f"reward 'ocr' needs the text that the image should show, in double quotes in the prompt or as its "
            f'metadata\'s "text": {prompt!r:.200}'
        )
    return list(texts)


def text_score(read: str, targets: Sequence[str]) -> float:
    """`1 - min(d, n) / n` of what was read for the texts that should be, see `TextShown`."""
    from rapidfuzz.distance import Levenshtein

    shown, *texts = ("".join(text.lower().split()) for text in (read, *targets))
    length = sum(map(len, texts))
    orders = itertools.permutations(texts) if len(texts) <= MAX_ORDERED else [texts]
    distance = min(Levenshtein.distance(shown, "".join(order)) for order in orders)
    return 1 - min(distance, length) / length
