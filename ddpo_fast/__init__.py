"""Fine-tune Stable Diffusion with reinforcement learning (DDPO): a drop-in replacement for TRL's DDPOTrainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddpo_fast.lazy_names import lazy_names
from ddpo_fast.version import __version__

if TYPE_CHECKING:
    from ddpo_fast.config import DDPOConfig
    from ddpo_fast.pipeline import DDPOStableDiffusionPipeline, DefaultDDPOStableDiffusionPipeline
    from ddpo_fast.sampler import DDPOPipelineOutput, DDPOSchedulerOutput
    from ddpo_fast.trainer import DDPOTrainer

__all__ = [
    "DDPOConfig",
    "DDPOPipelineOutput",
    "DDPOSchedulerOutput",
    "DDPOStableDiffusionPipeline",
    "DDPOTrainer",
    "DefaultDDPOStableDiffusionPipeline",
    "__version__",
]

# The module of each name, imported when the name is first used: torch and diffusers take seconds to import, which
# `ddpo-fast --help` and a script that only makes a config do not need.
_MODULES = {
    "DDPOConfig": "config",
    "DDPOPipelineOutput": "sampler",
    "DDPOSchedulerOutput": "sampler",
    "DDPOStableDiffusionPipeline": "pipeline",
    "DDPOTrainer": "trainer",
    "DefaultDDPOStableDiffusionPipeline": "pipeline",
}

__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
