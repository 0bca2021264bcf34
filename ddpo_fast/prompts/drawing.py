"""Draws prompts from lists and from users' functions, each repeated for a group of images."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from typing import Any

from ddpo_fast.interruption import Signalled
from ddpo_fast.user_functions import describe_value, error_line, function_name, where_raised

PromptFunction = Callable[[], tuple[str, Any]]


class ListPrompts:
    """A prompt function that draws from a list at random, by Python's global generator, whose state a checkpoint keeps.

    Args:
        prompts: what is drawn from.
        metadata: a dict for each prompt; None for empty ones.
    """

    def __init__(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]] | None = None) -> None:
        self.prompts = prompts
        self.metadata = metadata

    def __call__(self) -> tuple[str, dict[str, Any]]:
        # draws as `random.choice(self.prompts)` does, which TRL's example script calls
        return self._pair(random.choice(range(len(self.prompts))))

    def share(self, generator: random.Random, process: int, processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Draws of one of several processes, without end.

        The list is shuffled again and again, and process p takes every item p, p + processes, p + 2 processes and so
        on. Until the first order is used up, no item is drawn twice, in whatever process.

        Args:
            generator: shuffles; in the same state in all processes.
        """
        order = chain.from_iterable(shuffled(len(self.prompts), generator) for _ in count())
        return map(self._pair, islice(order, process, None, processes))

    def _pair(self, i: int) -> tuple[str, dict[str, Any]]:
        # a copy, as a reward may write to it
        return self.prompts[i], {} if self.metadata is None else dict(self.metadata[i])


def shuffled(size: int, generator: random.Random) -> Iterator[int]:
    """The numbers below `size` in random order (Fisher and Yates), of a long list only as many as are asked for."""
    moved: dict[int, int] = {}
    for last in range(size - 1, -1, -1):
        at = generator.randint(0, last)
        yield moved.get(at, at)
        moved[at] = moved.get(last, last)


def draw_prompts(prompt_function: PromptFunction, number: int) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """`number` draws of the function, as (prompts, metadata), which may be the same in every process.

    Raises `ValueError` if the function raises, or returns anything but a prompt and its metadata.
    """
    prompts, metadata = zip(*islice(_draws(prompt_function), number), strict=True)
    return prompts, metadata


class PromptGroups:
    """Draws prompts of which each is used `size` times in a row, also across calls of `draw`.

    Of a list, several processes draw different prompts, as far as it is long enough. All of them have to make their
    object at the same point, as the main process then sends the seed of the order to the others.
    """

    def __init__(self, prompt_function: PromptFunction, size: int) -> None:
        # imported here, so that commands that only need the names of lists start without torch
        from accelerate import PartialState

        from ddpo_fast.processes import broadcast_from_main

        state = PartialState()
        if isinstance(prompt_function, ListPrompts) and state.num_processes > 1:
            generator = random.Random(broadcast_from_main(state, random.getrandbits(64)))
            draws = prompt_function.share(generator, state.process_index, state.num_processes)
        else:
            draws = _draws(prompt_function)
        self._repeated = (pair for pair in draws for _ in range(size))

    def draw(self, number: int) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """The next `number` prompts as (prompts, metadata); raises what `draw_prompts` raises."""
        prompts, metadata = zip(*islice(self._repeated, number), strict=True)
        return prompts, metadata


def _draws(prompt_function: PromptFunction) -> Iterator[tuple[str, Any]]:
    while True:
        yield _draw(prompt_function)


def _draw(prompt_function: PromptFunction) -> tuple[str, Any]:
    try:
        pair = prompt_function()
    except Signalled:
        raise
    # a function that calls `sys.exit` would end the run without a message
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"the prompt function raised {error_line(error)} ({where_raised(error, prompt_function)})"
        ) from error
    name = function_name(prompt_function)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
        raise ValueError(
            "the prompt function must return (prompt, metadata) with a string first, "
            f"got {describe_value(pair)} ({name})"
        )
    # checkpoints keep plain strings only: this makes one of NumPy's strings and of members of an enumeration
    prompt = str.__str__(pair[0])
    if not is_text(prompt):
        raise ValueError(
            f"the prompt function returned {prompt!r:.80} ({name}), which is no text: it has a NUL, or half of a "
            "character that UTF-16 writes as two"
        )
    return prompt, pair[1]


def is_text(prompt: str) -> bool:
    """Whether a string has neither a NUL nor half of a character that UTF-16 writes as two."""
    return prompt.isprintable() or not any(
        character == "\0" or "\ud800" <= character <= "\udfff" for character in prompt
    )
