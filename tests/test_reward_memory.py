"""Predicted memory of rewards: of their weights, of what a batch takes, and of their own processes."""

from __future__ import annotations

import pytest
import torch
from tiny_clip import write_clip

from ddpo_fast import DDPOConfig
from ddpo_fast.commands import plan
from ddpo_fast.commands.options import RunArguments
from ddpo_fast.device_memory import CUDA_CONTEXT
from ddpo_fast.model_configs import check_model
from ddpo_fast.plan.live_bytes import LiveBytes, fused_attention
from ddpo_fast.plan.reward_memory import COPIES, PROCESS, RewardMemory
from ddpo_fast.rewards.clip import ClipNetwork
from ddpo_fast.rewards.clip_score import ClipScore
from ddpo_fast.tiny_sd import MODEL


@pytest.fixture(scope="module")
def memory_of(tmp_path_factory):
    """The folder of a CLIP, and a function: the memory of options, for batches of 2 images of 64 x 64."""
    folder, configs = str(write_clip(tmp_path_factory.mktemp("clip"))), check_model(str(MODEL))

    config = DDPOConfig(sample_batch_size=2)

    def memory(reward="clip_score", device_type="cuda", **options):
        return plan.memory_of_rewards(RunArguments(reward=reward, **options), config, configs, device_type)

    return folder, memory


def test_the_weights_of_rewards_are_counted(memory_of):
    folder, memory = memory_of
    size = ClipScore(model=folder).memory_bytes(torch.float16)

    def weights(**options):
        found = memory(reward_model=folder, **options)
        return found.resident, found.offloaded, found.host

    assert weights() == weights(eval_reward="clip_score") == (size, 0, 0)
    assert weights(reward_offload=True) == (0, size, size)
    assert weights(reward_device="cpu") == (0, 0, 2 * size)
    assert weights(reward_options={"dtype": "fp32"}) == (2 * size, 0, 0)
    assert memory("jpeg_compressibility") == RewardMemory(activations=COPIES * 2 * 3 * 64 * 64 * 4)


def test_a_rewards_own_process_keeps_all_that_it_takes(memory_of):
    folder, memory = memory_of
    settings = {"reward": "clip_score,jpeg_compressibility", "reward_model": folder}
    for offload in (False, True):
        here = memory(reward_offload=offload, **settings)
        away = memory(reward_offload=offload, reward_process=True, **settings)
        kept = here.resident + here.offloaded + here.activations + 2 * CUDA_CONTEXT
        assert away == RewardMemory(processes=kept, host=here.host + 2 * PROCESS)
    on_cpu = memory(reward_process=True, device_type="cpu", **settings)
    assert (on_cpu.processes, on_cpu.host) == (0, 2 * PROCESS)


def test_rewards_of_a_sum_compute_at_the_same_time_and_evaluations_at_others(memory_of):
    folder, memory = memory_of
    both, clip, jpeg = (
        memory(reward, **({"reward_model": folder} if "clip" in reward else {})).activations
        for reward in ("clip_score,jpeg_compressibility", "clip_score", "jpeg_compressibility")
    )
    assert both == clip + jpeg
    assert memory(reward_model=folder, eval_reward="jpeg_compressibility").activations == clip


def test_the_trace_of_a_reward_is_that_of_its_network(memory_of):
    folder, memory = memory_of
    images = torch.rand(2, 3, 64, 64)
    clip = ClipNetwork(folder)
    clip.network.load()
    with fused_attention("cpu"), LiveBytes("cpu") as live:
        clip.image_embeds(images)
    traced = memory(reward_model=folder, device_type="cpu").activations - COPIES * images.nbytes
    # the trace counts the images, which exist here before
    assert traced - images.nbytes == pytest.approx(max(live.after_op), rel=0.02)
