"""Where prompts come from: named lists, text files, or the user's function `() -> (prompt, metadata)`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpo_fast.plugin import load_function
from ddpo_fast.tiny_sd.drawings import ANIMALS, FACES, with_article

PromptFunction = Callable[[], tuple[str, Any]]

# the list of TRL's example script
TRL_ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion frog chicken duck goose bee pig turkey fly "
    "llama camel bat gorilla hedgehog kangaroo"
).split()

PROMPT_LISTS: dict[str, list[str]] = {
    "animals": TRL_ANIMALS,
    # the 45 animals of the DDPO paper come first in the bundled model's list
    "simple_animals": [with_article(name) for name in ANIMALS[:45]],
    "tiny_animals": [with_article(name) for name in [*ANIMALS, *(f"{name} face" for name in FACES)]],
    "demo_animals": [with_article(name) for name in ("lion", "penguin", "panda", "owl")],
}


def load_prompts(spec: str) -> PromptFunction:
    """A prompt function from a named list, a text file (one prompt per line) or 'module:function'.

    Lists are drawn from with Python's `random`, so that a resumed run draws what an uninterrupted one would.
    """
    if spec in PROMPT_LISTS:
        return ListPrompts(PROMPT_LISTS[spec])
    path = Path(spec).expanduser()
    if path.is_file():
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        prompts = [line for line in lines if line]
        if not prompts:
            raise ValueError(f"prompts is {spec!r}, and that file has no prompt in it: write one per line")
        return ListPrompts(prompts)
    if ":" not in spec:
        raise ValueError(
            f"prompts is {spec!r}, which is neither a file nor 'module:function' nor one of {', '.join(PROMPT_LISTS)}"
        )
    return load_function("prompts", spec)


class ListPrompts:
    """Draws one prompt of a list at random, without metadata."""

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts

    def __call__(self) -> tuple[str, dict[str, Any]]:
        return random.choice(self.prompts), {}


def draw_prompts(prompt_function: PromptFunction, count: int) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """`count` draws as (prompts, metadata). Raises `ValueError` if the function returns anything but a pair."""
    drawn = []
    for _ in range(count):
        pair = prompt_function()
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(
                f"the prompt function must return (prompt, metadata) with a string first, got {pair!r:.80}"
            )
        drawn.append(pair)
    prompts, metadata = zip(*drawn, strict=True)
    return prompts, metadata
