"""Predicts the memory that training takes, and chooses settings that fit a GPU. Nothing that trains imports it.

    live_bytes.py     the bytes of a computation's tensors after each op, traced on PyTorch's `meta` device
    footprint.py      a model's weights and the live bytes of each of its computations, from its config files
    update_bytes.py   the memory of an update: gradients, optimizer states, temporary copies
    zero_bytes.py     the memory of DeepSpeed's gradients, sums and buckets
    reward_memory.py  the memory of the rewards
    phases.py         the total memory of each phase of a run
    candidates.py     the fastest settings that fit

Other packages import from here only.
"""

from ddpo_fast.plan.candidates import MARGIN, Choice, choose
from ddpo_fast.plan.footprint import Adapter, Footprint
from ddpo_fast.plan.phases import CUDA_WORKSPACES, Plan, predict
from ddpo_fast.plan.reward_memory import RewardMemory, reward_memory

__all__ = [
    "CUDA_WORKSPACES",
    "MARGIN",
    "Adapter",
    "Choice",
    "Footprint",
    "Plan",
    "RewardMemory",
    "choose",
    "predict",
    "reward_memory",
]
