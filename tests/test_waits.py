"""Work on several CUDA streams waits where it must. A stand-in for CUDA checks it, so that no GPU is needed."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from recording_streams import Device, MissingWait, put_behind_torch
from torch import nn

from ddpo_fast import cuda_graphs
from ddpo_fast.cuda_graphs import Recorded
from ddpo_fast.engine import optimizers
from ddpo_fast.engine.offload import Offload
from ddpo_fast.offload_frozen import offload, on_device
from ddpo_fast.rewards import scoring


@pytest.fixture
def device(monkeypatch):
    made = Device()
    put_behind_torch(made, monkeypatch)
    monkeypatch.setattr(scoring, "_THREAD_LOCAL", threading.local())
    cuda_graphs._stream.cache_clear()
    with made:
        yield made
    cuda_graphs._stream.cache_clear()


# the stand-in itself


def write_on_a_side_stream(device, x, waits_before=True):
    side = torch.cuda.Stream()
    if waits_before:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.add_(1)
    return side


def test_a_missing_wait_is_found(device):
    x = device.on_device(torch.zeros(3))
    with pytest.raises(MissingWait, match="side stream does not wait for the default stream"):
        write_on_a_side_stream(device, x, waits_before=False)
    side = write_on_a_side_stream(device, x)
    with pytest.raises(MissingWait, match="default stream does not wait for the side stream"):
        x + 1
    torch.cuda.current_stream().wait_stream(side)
    x + 1
    assert len(device.unrecorded()) == 1


def test_a_missing_wait_of_the_host_is_found(device):
    x, y = device.on_device(torch.ones(3)), torch.zeros(3)
    y.copy_(x, non_blocking=True)
    done = torch.cuda.Event()
    done.synchronize()
    with pytest.raises(MissingWait, match="main thread does not wait for the default stream"):
        y.add_(1)
    done.record()
    with pytest.raises(MissingWait):
        y + 1
    done.synchronize()
    y.add_(1)
    x.copy_(y, non_blocking=True)
    with pytest.raises(MissingWait):
        y.zero_()
    y.copy_(x)
    y.zero_()


# CUDA graphs


def test_recording_waits_for_its_arguments_and_is_waited_for(device):
    """The function adds to a total on the device, which `undo` and the next replay write to."""
    total = device.on_device(torch.zeros(3))

    def add(x):
        total.add_(x)
        return [x + 1]

    recorded = Recorded(add, total.zero_)
    for _ in range(2):
        x = device.on_device(torch.ones(3))
        (y,) = recorded(x)
        assert y + total is not None
    recorded.forget()
    assert not recorded._recordings


# the step in host memory


@pytest.fixture
def stepped(device, monkeypatch):
    """Runs a step in host memory with one bucket for each weight, and reads the updated copies on the device."""
    monkeypatch.setattr(optimizers, "BUCKET", 1)
    count = 5
    masters = [nn.Parameter(torch.full((i + 2,), 1.0)) for i in range(count)]
    copies = [device.on_device(torch.ones(i + 2)) for i in range(count)]
    weights = SimpleNamespace(masters=masters, copies=copies, gradients=[])
    step = Offload(torch.optim.SGD(masters, lr=0.5), weights).step

    def run():
        weights.gradients = [device.on_device(copy * 0 + 1) for copy in copies]
        step(1.0)
        return [copy * 1 for copy in copies]

    return run


def test_a_step_in_host_memory_waits_for_its_copies(device, stepped):
    for expected in (0.5, 0.0):
        for copy in stepped():
            assert torch.equal(copy, torch.full_like(copy, expected))
    assert not device.unrecorded()


# rewards


class Later:
    """An executor that runs a function only when its result is asked for."""

    def __init__(self, device):
        self.device = device

    def submit(self, function, *arguments):
        submitted = dict(self.device.host.clock)

        def result():
            with self.device.thread(submitted) as thread:
                made = function(*arguments)
            self.device.host.join(thread.clock)
            return made

        return SimpleNamespace(result=result, done=lambda: False, cancel=lambda: None)


def test_rewards_wait_for_their_images_and_are_waited_for(device, monkeypatch):
    # The checks in `score` read values, which waits for the stream. Without them a missing wait shows.
    monkeypatch.setattr(scoring, "score", lambda function, images, *others: function(images, *others))
    scored = scoring.Scoring(lambda images, *_: (images.sum(1), {"mean": images.mean(1)}), Later(device))
    images = device.on_device(torch.ones(2, 3))
    batch = [images, ("a", "b"), ((), ())]
    scored.begin(batch)
    # the caller continues with other work on its stream
    device.on_device(torch.zeros(3)).add_(1)
    ((scores, metadata),) = scored.results([batch])
    assert torch.equal(scores * 1, torch.full((2,), 3.0))
    assert torch.equal(metadata["mean"] * 1, torch.ones(2))
    assert not [memory for memory in device.unrecorded() if memory is device.memory(images)]


# networks that are offloaded to host memory


def test_an_offloaded_network_is_in_pinned_memory_and_its_stream_waits_for_its_copy(device):
    network = nn.Linear(3, 2)
    for tensor in network.parameters():
        device.on_device(tensor)
    expected = network(device.on_device(torch.ones(1, 3))).detach().clone()
    offload(network, torch.float32)
    homes = [parameter.data for parameter in network.parameters()]
    for home in homes:
        assert device.memory(home).pinned
        assert not home.is_cuda
    for _ in range(2):
        with on_device(network, torch.device("cuda")):
            assert all(parameter.is_cuda for parameter in network.parameters())
            assert torch.equal(network(device.on_device(torch.ones(1, 3))), expected)
        for parameter, home in zip(network.parameters(), homes, strict=True):
            assert parameter.data_ptr() == home.data_ptr()


def test_blocks_are_on_the_device_only_while_they_compute(device):
    """The weight that a block shares with the module outside is there all the time."""
    network = nn.ModuleDict({"first": nn.Linear(3, 3), "blocks": nn.ModuleList(nn.Linear(3, 3) for _ in range(2))})
    network["blocks"][1].bias = network["first"].bias
    x = device.on_device(torch.ones(1, 3))
    seen = []

    def compute(fails=False):
        y = network["first"](x)
        for block in network["blocks"]:
            y = block(y)
            seen.append([block.weight.is_cuda, block.bias.is_cuda])
            if fails:
                block(y[:, :2])
        return y

    for tensor in network.parameters():
        device.on_device(tensor)
    expected = compute().detach().clone()
    seen.clear()
    offload(network, torch.float32)
    homes = [parameter.data_ptr() for parameter in network.parameters()]
    with on_device(network, torch.device("cuda"), by_blocks=True):
        assert torch.equal(compute(), expected)
    with pytest.raises(RuntimeError), on_device(network, torch.device("cuda"), by_blocks=True):
        compute(fails=True)
    assert seen == [[False, False], [False, True], [False, False]]
    assert [parameter.data_ptr() for parameter in network.parameters()] == homes
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in network["blocks"])
