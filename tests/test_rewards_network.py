"""Networks of rewards: loaded once, moved with the images, used by several threads and streams."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from one_sentence import refused
from recording_streams import CUDA, Device, MissingWait, put_behind_torch
from torch import nn

from ddpo_fast.rewards import network
from ddpo_fast.rewards.network import Network, weight_bytes

CPU = torch.device("cpu")


def make_network(**options) -> Network:
    return Network(lambda: nn.Linear(3, 2), **{"device": None, "dtype": None, "offload": False, **options})


def test_threads_load_once():
    loads, together = [], threading.Barrier(4)

    def load():
        loads.append(1)
        return nn.Linear(3, 2)

    shared = Network(load, None, None, False)

    def use(_):
        together.wait(timeout=30)
        with shared.on(CPU) as (layer, _, _):
            return layer

    with ThreadPoolExecutor(4) as threads:
        layers = list(threads.map(use, range(4)))
    assert len(loads) == 1
    assert all(layer is layers[0] for layer in layers)


def test_a_load_that_fails_is_tried_again():
    answers = [OSError("no file"), nn.Linear(3, 2)]

    def load():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    shared = Network(load, None, None, False)
    with pytest.raises(OSError, match="no file"):
        shared.load()
    with shared.on(CPU) as (layer, _, _):
        assert layer(torch.zeros(1, 3)).shape == (1, 2)


def test_nothing_outside_changes():
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16), make_network().on(CPU) as (layer, device, dtype):
        assert (device, dtype) == (CPU, torch.float32)
        result = layer(torch.ones(1, 3))
        assert result.dtype == torch.float32
        assert not result.requires_grad
        assert not layer.training
    assert torch.is_grad_enabled()
    # the layer's own random weights are drawn by what the test loads
    torch.set_rng_state(state)
    assert torch.get_default_dtype() == torch.float32


def test_bytes():
    assert weight_bytes(nn.Linear(3, 2), torch.float16) == (3 * 2 + 2) * 2


def test_wrong_options(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with refused(ValueError, "device is 'gpu'"):
        make_network(device="gpu")
    with refused(ValueError, "sees 0 GPUs"):
        make_network(device="cuda:1")
    for unusable in (torch.int8, "float"):
        with refused(ValueError, "dtype is .* must be one of fp32, fp16, bf16"):
            make_network(dtype=unusable)
    assert make_network(dtype="bf16").dtype == make_network(dtype=torch.bfloat16).dtype == torch.bfloat16
    for wrong in (0, 2.0, True):
        with refused(ValueError, "batch_size is"):
            network.checked_batch_size(wrong)


# streams


def use_in_threads(gpu: Device, shared: Network) -> list[torch.Tensor]:
    """The weights that two threads see, the second of which has a stream that does not wait for the first one's."""
    seen, began = [], dict(gpu.host.clock)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        with gpu.thread(began) as host, torch.cuda.stream(stream):
            with shared.on(CUDA) as (layer, _, dtype):
                images = gpu.on_device(torch.ones(1, 3, dtype=dtype))
                layer(images)
                seen.append(layer.weight.clone())
            # the lock orders the threads, and not what they have queued
            began = dict(host.clock)
    for stream in streams:
        stream.synchronize()
    return seen


@pytest.fixture
def gpu(monkeypatch):
    with Device() as device:
        put_behind_torch(device, monkeypatch)
        yield device


@pytest.mark.parametrize("offload", [False, True])
def test_each_stream_finds_complete_weights(gpu, offload):
    made = nn.Linear(3, 2)
    wanted = made.weight.detach().half()
    first, second = use_in_threads(gpu, Network(lambda: made, None, None, offload))
    assert torch.equal(first, wanted)
    assert torch.equal(second, wanted)
    if offload:
        assert made.weight.device == CPU
        assert gpu.memory(made.weight).pinned
    else:
        assert made.weight.device == CUDA


def test_the_stand_in_notices_a_missing_wait(gpu, monkeypatch):
    monkeypatch.setattr(nn.Module, "to", lambda module, device, dtype: _moved_without_waiting(module, dtype))
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", lambda stream: None)
    with pytest.raises(MissingWait):
        use_in_threads(gpu, make_network())


def _moved_without_waiting(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype).to(CUDA, non_blocking=True)


def test_nested_uses_copy_offloaded_weights_once(gpu, monkeypatch):
    copies = []
    on_device = network.on_device

    def counted(module, device):
        copies.append(module.weight.device)
        return on_device(module, device)

    monkeypatch.setattr(network, "on_device", counted)
    shared = make_network(offload=True)
    with shared.on(CUDA), shared.on(CUDA) as (layer, _, _):
        assert layer.weight.device == CUDA
    assert copies == [CPU, CUDA]
    assert shared.load().weight.device == CPU
