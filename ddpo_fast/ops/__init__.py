"""The arithmetic of DDPO: the Gaussian denoising step with its log-prob, and the clipped PPO loss."""

from ddpo_fast.ops.ppo_loss import clipped_surrogate
from ddpo_fast.ops.step_logprob import guided, step_logprob, take_step

__all__ = ["clipped_surrogate", "guided", "step_logprob", "take_step"]
