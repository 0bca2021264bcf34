"""The command line's own voice: what other packages say of features that nothing here uses is left out.

In scripts and notebooks nothing is silenced: whose warnings are shown there is the user's affair.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Optional packages that diffusers and peft import where they are installed, used or not. Their errors are let through,
# and where an option asks for one of them that cannot run, that is an error of ours.
OPTIONAL = ("xformers", "bitsandbytes")
FILTERED = (
    "transformers.utils.import_utils",
    "transformers.tokenization_utils_base",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.models.modeling_utils",
    "DeepSpeed",
)
# no image is ever read; diffusers cuts long prompts before they can be an index; it is known where there is no GPU; a
# list of no modules
DROPPED = (
    "requires torchvision",
    "will result in indexing errors",
    "Setting accelerator to CPU",
    "that should be kept in float32: []",
)
# their remarks on future versions are for who calls them, and that is not the user here
CALLED = r"(accelerate|diffusers|huggingface_hub|peft|transformers)\b"
END = "<|endoftext|>"


class _Reworded(logging.Filter):
    """Drops what does not concern this program, and says in its words what does, once."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if any(part in text for part in DROPPED):
            return False
        if not text.startswith("The following part of your input was truncated"):
            return True
        lost = text.partition(":")[2].replace(END, "").strip(" []'\"")
        is_new = lost not in self.said
        self.said.add(lost)
        record.msg = "a prompt is longer than the text encoder reads; this end of it has no effect: %s"
        record.args = (f"{lost:.200}",)
        return is_new


@contextmanager
def other_packages() -> Iterator[None]:
    """Quiet while a command runs; afterwards loggers and warnings are as they were."""
    levels = {name: logging.getLogger(name).level for name in OPTIONAL}
    reworded = _Reworded()
    for name in OPTIONAL:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in FILTERED:
        logging.getLogger(name).addFilter(reworded)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=CALLED)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name in FILTERED:
            logging.getLogger(name).removeFilter(reworded)
