"""What a user's function gives a checkpoint is kept as plain data, or refused by its place."""

from __future__ import annotations

import enum
import io
import random
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpo_fast.run_folder.plain_data import pack, unpack


class Name(str, enum.Enum):
    CAT = "cat"


@dataclass
class Point:
    x: int = 0


def kept(value):
    """What comes back from a file."""
    file = io.BytesIO()
    torch.save(pack(value, "reward_function.state_dict()"), file)
    file.seek(0)
    return unpack(torch.load(file, weights_only=True))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.str_("a cat"), "a cat"),
        (np.float64(1.5), 1.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (Name.CAT, "cat"),
        ({np.str_("a"): [np.float32(0.5)]}, {"a": [0.5]}),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(int, a=1), {"a": 1}),
        ((1, None, 2.5, b"x", 1j), (1, None, 2.5, b"x", 1j)),
        (2**200, 2**200),
    ],
)
def test_values_of_pythons_own_types(value, expected):
    back = kept(value)
    assert back == expected
    assert type(back) is type(expected)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(5, dtype=np.uint32),
        np.zeros((0, 2)),
        np.array(3.0),
        np.array(["a", "bc"]),
        np.arange(3, dtype=">f8"),
        np.ones((2, 3), dtype=bool).T,
        np.array(["2024-01-02"], dtype="datetime64[D]"),
    ],
)
def test_arrays_come_back_as_they_were(array):
    back = kept({"array": array})["array"]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_tensors_of_other_classes_become_torchs_own():
    class Image(torch.Tensor):
        pass

    back = kept([torch.ones(2).as_subclass(Image), torch.nn.Parameter(torch.ones(2))])
    assert [type(tensor) for tensor in back] == [torch.Tensor, torch.Tensor]


def test_states_of_generators():
    legacy, modern, python = np.random.RandomState(1), np.random.default_rng(1), random.Random(1)
    states = kept([legacy.get_state(), modern.bit_generator.state, python.getstate()])
    expected = legacy.rand(), modern.random(), python.random()
    others = np.random.RandomState(2), np.random.default_rng(2), random.Random(2)
    others[0].set_state(states[0])
    others[1].bit_generator.state = states[1]
    others[2].setstate(states[2])
    assert (others[0].rand(), others[1].random(), others[2].random()) == expected


@pytest.mark.parametrize(
    "value",
    [
        *({1, 2}, Path("x"), lambda: 0, Point(), np.array([None]), np.random.default_rng(), torch.Generator()),
        np.ma.array([1.0, 2.0], mask=[True, False]),
    ],
)
def test_other_things_are_refused_by_their_place(value):
    with pytest.raises(ValueError, match=r"reward_function.state_dict\(\)\['best'\]\[1\] is of type") as caught:
        pack({"best": [0, value]}, "reward_function.state_dict()")
    assert "\n" not in str(caught.value)
