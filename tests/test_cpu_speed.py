from __future__ import annotations

import pytest
import torch

from ddpo_fast import cpu_speed


class Machine:
    """A clock, and calls that take the time that each number of threads is said to take."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.tried: list[int] = []

    def call(self) -> None:
        threads = torch.get_num_threads()
        self.now += self.seconds[threads]
        if threads not in self.tried:
            self.tried.append(threads)

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "best", "tried"),
    [
        # an idle machine: PyTorch's number, and no time for hopeless ones
        ({8: 1, 4: 1.9, 2: 3.7}, 8, [8, 4, 2]),
        # a gain that noise could be
        ({2: 1, 1: 0.9}, 2, [2, 1]),
        # a core that another program uses
        ({2: 27, 1: 1}, 1, [2, 1]),
        # a quota of four cores
        ({16: 30, 8: 28, 4: 2, 2: 3.5, 1: 7}, 4, [16, 8, 4, 2, 1]),
        ({6: 5, 3: 1, 1: 2.5}, 3, [6, 3, 1]),
        ({1: 1}, 1, [1]),
    ],
)
def test_the_fastest_number_of_threads(seconds, best, tried):
    before = torch.get_num_threads()
    machine = Machine(seconds)
    try:
        torch.set_num_threads(max(seconds))
        assert cpu_speed.fastest_threads(machine.call, machine.clock) == best
        assert torch.get_num_threads() == max(seconds)
    finally:
        torch.set_num_threads(before)
    assert machine.tried == tried


def test_threads_are_put_back_after_an_error():
    before = torch.get_num_threads()

    def call() -> None:
        if torch.get_num_threads() == 2:
            raise RuntimeError("out of memory")

    try:
        torch.set_num_threads(4)
        with pytest.raises(RuntimeError, match="out of memory"):
            cpu_speed.fastest_threads(call)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_the_speedup_of_bf16_is_a_ratio_of_the_least_times(monkeypatch):
    times = {torch.float32: iter([9.0, 6.0, 4.0, 5.0]), torch.bfloat16: iter([9.0, 2.0, 8.0, 2.5])}
    now = [0.0]

    def layers(rows, height, width, dtype=torch.float32):
        def call() -> None:
            now[0] += next(times[dtype])

        return call

    monkeypatch.setattr(cpu_speed, "layers", layers)
    assert cpu_speed.bf16_speedup(lambda: now[0]) == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_timed_layers_draw_nothing(dtype):
    state = torch.get_rng_state()
    assert cpu_speed.layers(2, 8, 4, dtype)().shape == (2, cpu_speed.CHANNELS, 8, 4)
    assert torch.equal(torch.get_rng_state(), state)
