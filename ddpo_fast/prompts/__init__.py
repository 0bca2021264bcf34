"""Where prompts come from: named lists, files, datasets, or the user's function `() -> (prompt, metadata)`."""

from __future__ import annotations

from ddpo_fast.prompts.drawing import ListPrompts, PromptFunction, PromptGroups, draw_prompts
from ddpo_fast.prompts.files import existing, read_file
from ddpo_fast.prompts.hugging_face import PREFIX, Source, read_dataset
from ddpo_fast.prompts.named_lists import PROMPT_LISTS, PROMPT_METADATA
from ddpo_fast.user_functions import load_function

__all__ = [
    "PROMPT_LISTS",
    "ListPrompts",
    "PromptFunction",
    "PromptGroups",
    "absolute",
    "draw_prompts",
    "existing",
    "load_prompts",
    "names_function",
]


def load_prompts(spec: str) -> PromptFunction:
    """A prompt function from the name of a list, a file, a dataset ('hf:...') or 'module:function'.

    Prompts of all but a function are drawn by Python's global generator, whose state a checkpoint keeps: a resumed run
    draws the same as one that was not interrupted. Raises `ValueError` if there is no such list, file, dataset or
    function, and for a file or dataset with something else than prompts in it, naming the row.
    """
    if spec in PROMPT_LISTS:
        return ListPrompts(PROMPT_LISTS[spec], PROMPT_METADATA.get(spec))
    if spec.startswith(PREFIX):
        return ListPrompts(*read_dataset(spec))
    if (path := existing(spec)) is not None:
        return ListPrompts(*read_file(path, spec))
    if ":" not in spec:
        raise ValueError(
            f"prompts is {spec!r:.200}, which is neither a file nor 'module:function' nor one of "
            f"{', '.join(PROMPT_LISTS)}"
        )
    return load_function("prompts", spec)


def names_function(spec: str) -> bool:
    """Whether `load_prompts` would import a module for `spec`."""
    return ":" in spec and not spec.startswith(PREFIX) and existing(spec) is None


def absolute(spec: str) -> str:
    """`spec` with the path in it made absolute, if it names a file or a folder."""
    if spec in PROMPT_LISTS:
        return spec
    start = PREFIX if spec.startswith(PREFIX) else ""
    name = Source.of(spec).name if start else spec
    path = existing(name)
    return spec if path is None else f"{start}{path.resolve()}{spec[len(start) + len(name) :]}"
