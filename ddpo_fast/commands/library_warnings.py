"""Hides warnings of other packages while a command runs, because they are about features that are not used here.

Only the commands hide them. A script or a notebook that imports `ddpo_fast` sees every warning, as its author should
decide what is shown.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Optional packages that diffusers and peft import if they are installed, used or not. Only their errors are shown; an
# option that asks for one of them on a machine where it cannot run is an error in any case.
OPTIONAL = ("xformers", "bitsandbytes")
# loggers whose records `_Filter` sees
FILTERED = (
    "transformers.utils.import_utils",
    "transformers.tokenization_utils_base",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.models.modeling_utils",
    "DeepSpeed",
)
# parts of messages that are dropped
DROPPED = (
    # transformers, of image processors: images are made here, never read
    "requires torchvision",
    # transformers, of a prompt that is too long: diffusers cuts it before the text encoder sees it
    "will result in indexing errors",
    # DeepSpeed, on a machine without a GPU
    "Setting accelerator to CPU",
    # diffusers, where the list of modules in it is empty
    "that should be kept in float32: []",
)
# Packages whose `FutureWarning`s are left out: they are for the author of the calling code, who is not the user.
CALLED = r"(accelerate|diffusers|huggingface_hub|peft|transformers)\b"
END = "<|endoftext|>"


class _Filter(logging.Filter):
    """Drops the messages in `DROPPED`, and rewords diffusers' message about a cut prompt, once for each prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.reported: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if any(part in text for part in DROPPED):
            return False
        if not text.startswith("The following part of your input was truncated"):
            return True
        cut_off = text.partition(":")[2].replace(END, "").strip(" []'\"")
        is_new = cut_off not in self.reported
        self.reported.add(cut_off)
        record.msg = "a prompt is longer than the text encoder reads; this end of it has no effect: %s"
        record.args = (f"{cut_off:.200}",)
        return is_new


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Applies the filters to other packages' loggers and warnings while a command runs, and removes them afterwards."""
    levels = {name: logging.getLogger(name).level for name in OPTIONAL}
    message_filter = _Filter()
    for name in OPTIONAL:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in FILTERED:
        logging.getLogger(name).addFilter(message_filter)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=CALLED)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name in FILTERED:
            logging.getLogger(name).removeFilter(message_filter)
