from __future__ import annotations

import asyncio
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from ddpo_fast.rewards import jpeg, jpeg_compressibility, jpeg_incompressibility, load, score


def test_jpeg_rewards_are_the_sizes_of_files():
    images = torch.stack(
        [torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))]
    )
    size, _ = jpeg_incompressibility(images, (), ())
    assert size[1] > 5 * size[0] > 0
    torch.testing.assert_close(jpeg_compressibility(images, (), ())[0], -size)


def test_an_image_that_is_not_finite_is_refused_by_jpeg_rewards():
    with pytest.raises(ValueError, match="not finite"):
        jpeg_compressibility(torch.tensor([0.5, float("nan")]).expand(1, 3, 2, 2), (), ())


@pytest.mark.parametrize("cores", [1, 3])
def test_jpeg_sizes_are_in_the_order_of_the_images(cores, monkeypatch):
    monkeypatch.setattr(jpeg, "_cores", lambda: cores)
    jpeg._threads.cache_clear()
    for size in (1, 40):
        images = torch.rand(7, 3, size, size, generator=torch.Generator().manual_seed(0)) ** torch.arange(7).view(
            -1, 1, 1, 1
        )
        alone = [jpeg_incompressibility(image[None], (), ())[0].item() for image in images]
        assert jpeg_incompressibility(images, (), ())[0].tolist() == alone
    jpeg._threads.cache_clear()


NUMBERS = np.array([1, 2, 3])


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0]).double(),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True),
        torch.nn.Parameter(torch.tensor([[1.0], [2.0], [3.0]])),
        [torch.tensor(1.0), torch.tensor(2, dtype=torch.int8), torch.tensor(3.0, requires_grad=True)],
        [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0], dtype=torch.bfloat16)],
        *(NUMBERS.astype(kind) for kind in ("float16", "longdouble", "uint16", "object", ">f4")),
        NUMBERS[::-1][::-1],
        list(NUMBERS.astype("float32")),
        [Fraction(1), Decimal(2), np.int64(3)],
        [[1.0], [2.0], [3.0]],
        np.ma.MaskedArray(NUMBERS),
    ],
)
def test_rewards_of_any_type_become_fp32(returned):
    rewards, info = score(lambda *_: (returned, "info"), torch.zeros(3, 3, 8, 8), ("a", "b", "c"), ({},) * 3)
    assert rewards.dtype == torch.float32
    assert type(rewards) is torch.Tensor
    assert not rewards.requires_grad
    assert rewards.tolist() == [1, 2, 3]
    assert info == "info"


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda *_: torch.ones(3), ValueError, "must return"),
        (lambda *_: (torch.ones(2), {}), ValueError, r"\(2,\) for 3 images"),
        (lambda *_: (torch.ones(3, 2), {}), ValueError, r"\(3, 2\) for 3 images"),
        (lambda *_: (torch.ones(1, 3), {}), ValueError, r"\(1, 3\) for 3 images"),
        (lambda *_: (torch.tensor([1.0, float("nan"), 1.0]), {}), ValueError, "nan for prompt 'b'"),
        (lambda *_: (torch.tensor([1.0, 1.0, float("inf")]), {}), ValueError, "inf for prompt 'c'"),
        (lambda *_: 1 / 0, RuntimeError, "ZeroDivisionError"),
    ],
)
def test_bad_rewards_are_named(function, error, words):
    with pytest.raises(error, match=words):
        score(function, torch.zeros(3, 3, 8, 8), ("a", "b", "c"), ({},) * 3)


@pytest.mark.parametrize("spec", ["nothing", "no_such_module:f", "math:no_such_function", ":", "math:"])
def test_an_unknown_reward_is_named(spec):
    with pytest.raises(ValueError, match="reward"):
        load(spec)


def test_a_reward_is_a_function_of_a_module():
    assert load("math:sqrt")(4) == 2


def test_a_reward_that_runs_an_event_loop_in_a_notebook():
    async def judged():
        return [1.0]

    def reward(images, prompts, metadata):
        ready = judged()
        try:
            return asyncio.run(ready), {}
        finally:
            ready.close()

    async def cell():
        return score(reward, torch.zeros(1, 3, 8, 8), ("a cat",), ({},))

    assert score(reward, torch.zeros(1, 3, 8, 8), ("a cat",), ({},))[0].tolist() == [1.0]
    with pytest.raises(RuntimeError, match=r"asyncio.run\(\).*; set async_reward_computation=True"):
        asyncio.run(cell())
