"""Memory predicted, and settings chosen that fit it. Nothing that trains imports this package."""

from ddpo_fast.plan.candidates import MARGIN, Choice, choose
from ddpo_fast.plan.footprint import Adapter, Footprint
from ddpo_fast.plan.phases import CUDA_WORKSPACES, Plan, predict

__all__ = ["CUDA_WORKSPACES", "MARGIN", "Adapter", "Choice", "Footprint", "Plan", "choose", "predict"]
