"""Fine-tune Stable Diffusion with reinforcement learning (DDPO): a drop-in replacement for TRL's DDPOTrainer."""

from ddpo_fast.config import DDPOConfig
from ddpo_fast.pipeline import DDPOStableDiffusionPipeline, DefaultDDPOStableDiffusionPipeline
from ddpo_fast.sampler import DDPOPipelineOutput, DDPOSchedulerOutput
from ddpo_fast.trainer import DDPOTrainer
from ddpo_fast.version import __version__

__all__ = [
    "DDPOConfig",
    "DDPOPipelineOutput",
    "DDPOSchedulerOutput",
    "DDPOStableDiffusionPipeline",
    "DDPOTrainer",
    "DefaultDDPOStableDiffusionPipeline",
    "__version__",
]
