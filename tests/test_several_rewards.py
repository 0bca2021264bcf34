"""Several rewards at once: names with weights, options, statistics, a part that fails, and a resumed run."""

from __future__ import annotations

import math
import sys
import threading
from types import ModuleType

import numpy as np
import pytest
import torch
from compare_runs import as_bytes, metrics_of, same_bits, trained_weights, without_timings
from one_sentence import refused
from tiny_run import brightness

from ddpo_fast.rewards import PartFailed, SeveralRewards, load, load_each, score, weights_of
from ddpo_fast.rewards.several import RunningSpread
from ddpo_fast.run_folder import checkpoint

IMAGES, PROMPTS, METADATA = (
    torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    ("a cat",) * 4,
    ({},) * 4,
)
FEW_STEPS = {"sample_num_steps": 2}


def redness(images, prompts, metadata):
    """Numbers of another size and place than those of `brightness`."""
    return 500 + 100 * images[:, 0].mean((1, 2)), {"red": images[:, 0].amax((1, 2)).tolist()}


def fails(images, prompts, metadata):
    raise ConnectionError("the server is gone")


class Above:
    """How much of the image is above `limit`."""

    def __init__(self, *, limit: float = 0.5, device: str | None = None) -> None:
        self.limit, self.device = limit, device

    def __call__(self, images, prompts, metadata):
        return (images > self.limit).float().mean((1, 2, 3)), {}


class Needs:
    def __init__(self, model):
        self.model = model

    def __call__(self, images, prompts, metadata):
        return [0.0] * len(images), {}


class Counts:
    """A reward with state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        return images.mean((1, 2, 3)) * self.calls, {}

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


@pytest.fixture
def mine(monkeypatch):
    """A module `mine` with these functions and classes."""
    module = ModuleType("mine")
    for each in (brightness, redness, fails, Above, Needs, Counts):
        setattr(module, each.__name__, each)
    module.number = 3
    monkeypatch.setitem(sys.modules, "mine", module)


# names and options


def test_names_and_weights():
    spec = " a:b , jpeg_compressibility:-0.5,c:d:2e-1, e:f:.5"
    assert weights_of(spec) == {"a:b": None, "jpeg_compressibility": -0.5, "c:d": 0.2, "e:f": 0.5}
    assert weights_of("jpeg_compressibility") == {"jpeg_compressibility": None}
    # a user's functions
    assert weights_of("rewards:nan,rewards:inf:2") == {"rewards:nan": None, "rewards:inf": 2}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("clip_score:nan", "'clip_score' has the weight nan"),
        ("a:1,b:-inf", "'b' has the weight -inf"),
        ("a:0", "'a' has the weight 0 but needs a finite number that is not 0"),
        ("a:b,a:b:2", "names 'a:b' twice"),
        ("a,,b", "a name is missing"),
        ("", "a name is missing"),
        (":2", "a name is missing"),
        ("jpeg_compressibility,nothing:2", "'nothing', which is neither 'module:function' nor one of"),
        ("jpeg_compressibility,mine:nothing", "has no function 'nothing'"),
        ("mine:Needs", "missing a required argument: 'model'"),
    ],
)
def test_wrong_names_and_weights_are_refused(spec, said, mine):
    with refused(ValueError, "reward", said):
        load(spec)


def test_a_name_alone_is_the_function_and_a_class_is_instantiated(mine):
    assert load("mine:brightness") is brightness
    above = load("mine:Above", limit=0.9)
    assert (above.limit, above.device) == (0.9, None)
    assert isinstance(load("mine:brightness:1"), SeveralRewards)


def test_options_go_to_the_classes_that_take_them(mine):
    several = load("mine:Above,mine:Needs:2,mine:redness", limit=0.1, model={"mine:Needs": "folder"})
    assert several.parts["mine:Above"].limit == 0.1
    assert several.parts["mine:Needs"].model == "folder"
    assert several.weights == {"mine:Above": 1, "mine:Needs": 2, "mine:redness": 1}
    trained, watched = load_each(["mine:Above", "mine:Above,mine:brightness"], limit=0.2)
    assert watched.parts["mine:Above"] is trained


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"token": "secret"}, "no reward option 'token': mine:Above takes limit, device; mine:redness takes none"),
        ({"limit": {"mine:redness": 1}}, "mine:redness takes none"),
        ({"limit": {"mine:blue": 1}}, "limit is given for reward 'mine:blue', but there are only mine:Above"),
    ],
)
def test_an_option_that_no_reward_takes_is_refused(options, said, mine):
    with refused(ValueError, "", said) as caught:
        load("mine:Above,mine:redness", **options)
    assert "secret" not in str(caught.value)


# the sum


def test_statistics_of_groups_are_those_of_all_values():
    values = np.random.default_rng(0).normal(1e4, 0.5, 1000).astype(np.float32)
    spread = RunningSpread()
    for group in np.split(values, [1, 30, 700]):
        spread.add(group)
    wide = values.astype(np.float64)
    np.testing.assert_allclose([spread.mean, spread.std], [wide.mean(), wide.std()], rtol=1e-9)
    assert spread.origin == values[0]


def test_a_sum_by_itself_is_of_the_parts_as_they_are(mine):
    several = load("mine:brightness,mine:redness:-2")
    rewards, info = score(several, IMAGES, PROMPTS, METADATA)
    bright, red = brightness(IMAGES, PROMPTS, METADATA)[0], redness(IMAGES, PROMPTS, METADATA)[0]
    torch.testing.assert_close(rewards, bright - 2 * red)
    torch.testing.assert_close(info["components"], {"mine:brightness": bright, "mine:redness": red})
    assert len(info["metadata"]["mine:redness"]["red"]) == 4
    raw = load("mine:brightness,mine:redness:-2", normalize=False)
    torch.testing.assert_close(raw.weighted(info["components"]), rewards)


def test_parts_count_by_their_weights_and_not_by_the_size_of_their_numbers(mine):
    several = load("mine:brightness,mine:redness:-2")
    red, bright = torch.tensor([400.0, 600.0, 500.0, 500.0]), torch.tensor([0.2, 0.2, 0.1, 0.3])
    parts = {"mine:brightness": bright, "mine:redness": red}
    several.observe({name: part.numpy() for name, part in parts.items()})
    expected = [2 * math.sqrt(2), -2 * math.sqrt(2), -math.sqrt(2), math.sqrt(2)]
    torch.testing.assert_close(several.weighted(parts), torch.tensor(expected))
    # later epochs are measured from the first one's mean, by the spread of all images so far
    later = {"mine:brightness": bright + 1, "mine:redness": red}
    several.observe({name: part.numpy() for name, part in later.items()})
    std = np.concatenate([bright, bright + 1]).std()
    torch.testing.assert_close(several.weighted(later)[0].item(), 1 / std + 2 * math.sqrt(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("constant", [[3.0] * 4, [0.0] * 4, [5, 5 + 1e-6, 5, 5]])
def test_a_part_without_spread_adds_nothing(constant, mine):
    several = load("mine:brightness,mine:redness")
    parts = {"mine:brightness": torch.tensor([0.0, 1.0, 0.0, 1.0]), "mine:redness": torch.tensor(constant)}
    several.observe({name: part.numpy() for name, part in parts.items()})
    assert several.weighted(parts).tolist() == [-1, 1, -1, 1]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (fails, "reward 'b' raised ConnectionError: the server is gone ("),
        (lambda *_: (torch.full((4,), math.nan), {}), "reward 'b' returned nan for prompt 'a cat'"),
        (lambda *_: ([0.0], {}), "reward 'b' returned rewards of shape (1,) for 4 images"),
        (lambda *_: None, "reward 'b' must return (rewards, metadata)"),
    ],
)
def test_a_part_that_fails_is_named(part, said):
    several = SeveralRewards({"a": brightness, "b": part, "c": redness}, {"a": 1, "b": 1, "c": 1})
    with refused(PartFailed, "", said):
        score(several, IMAGES, PROMPTS, METADATA)


@pytest.mark.parametrize("failing", [False, True])
def test_parts_in_threads_compute_side_by_side_and_the_others_in_the_callers(failing):
    """From the second call on each part waits until all of them have begun."""
    met, seen = threading.Barrier(3, timeout=20), {}

    def meets(name):
        def reward(images, prompts, metadata):
            seen[name] = threading.current_thread(), torch.get_num_threads()
            # at the first call the caller's parts come first, as they may load a network
            if several._was_called:
                met.wait()
            if failing and several._was_called and name == "c":
                raise ConnectionError("gone")
            return images.mean((1, 2, 3)) * len(name), {"of": name}

        return reward

    names = ["bb", "a", "c"]
    several = SeveralRewards({name: meets(name) for name in names}, dict.fromkeys(names, 1), in_threads=["c", "bb"])
    first = score(several, IMAGES, PROMPTS, METADATA)
    if failing:
        with refused(PartFailed, "reward 'c' raised ConnectionError"):
            score(several, IMAGES, PROMPTS, METADATA)
        return
    rewards, info = score(several, IMAGES, PROMPTS, METADATA)
    assert torch.equal(rewards, first[0])
    assert list(info["components"]) == list(info["metadata"]) == names
    assert info["metadata"]["c"] == {"of": "c"}
    assert [seen[name][0] is threading.current_thread() for name in names] == [False, True, False]
    assert {threads for _, threads in seen.values()} == {torch.get_num_threads()}


def test_a_users_function_stays_in_the_thread_that_calls(mine):
    several = load("mine:brightness,jpeg_compressibility,mine:redness")
    assert several.in_threads == ["jpeg_compressibility"]
    assert load("jpeg_compressibility:2").in_threads == []
    assert load("mine:brightness,mine:redness", own_process=True).in_threads == ["mine:brightness", "mine:redness"]


def test_each_part_gets_the_images_as_they_were_sampled():
    def blackens(images, prompts, metadata):
        return images.zero_().sum((1, 2, 3)), {}

    several = SeveralRewards({"a": blackens, "b": brightness}, {"a": 1, "b": 1})
    assert score(several, IMAGES, PROMPTS, METADATA)[0].min() > 0


# in the trainer


@pytest.mark.parametrize("is_async", [False, True])
def test_a_part_that_fails_stops_a_run(is_async, make_trainer, mine):
    trainer = make_trainer(
        reward="mine:brightness,mine:fails,mine:redness", async_reward_computation=is_async, **FEW_STEPS
    )
    with pytest.raises(PartFailed, match="reward 'mine:fails' raised ConnectionError: the server is gone"):
        trainer.train()


def test_an_epoch_is_normalized_as_a_whole_and_its_parts_are_logged(make_trainer, mine):
    kept = []
    trainer = make_trainer(
        reward="mine:brightness:1,mine:redness:-1,mine:Counts:0.5",
        hook=lambda batches, *_: kept.append([batch[3:] for batch in batches]),
        async_reward_computation=True,
        max_workers=1,
        **FEW_STEPS,
    )
    trainer.train()
    seen = {name: np.zeros(0) for name in trainer.reward_fn.parts}
    origin = {}
    for batches, record in zip(kept, metrics_of(trainer, "epoch"), strict=True):
        expected = np.zeros(8)
        for name, weight in trainer.reward_fn.weights.items():
            part = np.concatenate([info["components"][name] for _, info in batches]).astype(np.float64)
            np.testing.assert_allclose(record[f"reward/{name}_mean"], part.mean(), rtol=1e-6)
            np.testing.assert_allclose(record[f"reward/{name}_std"], part.std(), rtol=1e-3)
            origin.setdefault(name, part.mean())
            seen[name] = np.concatenate([seen[name], part])
            expected += weight * (part - origin[name]) / seen[name].std()
        rewards = torch.cat([rewards for rewards, _ in batches]).numpy()
        np.testing.assert_allclose(rewards, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(record["reward_mean"], rewards.mean(), atol=1e-6)


def test_groups_drawn_again_are_measured_like_the_first_ones(make_trainer, mine):
    flat = [True]

    def flat_at_first(images, prompts, metadata):
        return images.mean((1, 2, 3)) * (0 if flat and flat.pop() else 1), {}

    sys.modules["mine"].flat_at_first = flat_at_first
    reward = load("mine:flat_at_first")
    several = SeveralRewards({"a": reward}, {"a": 3})
    trainer = make_trainer(reward=several, sample_group_size=4, sample_redraws=1, num_epochs=1, **FEW_STEPS)
    trainer.train()
    assert several.spreads["a"].count == 8
    [record] = metrics_of(trainer, "epoch")
    assert record["images_scored"] == 12
    expected = 3 * (record["reward/a_mean"] - several.spreads["a"].origin) / several.spreads["a"].std
    np.testing.assert_allclose(record["reward_mean"], expected, rtol=1e-5)


def test_a_resumed_run_has_the_same_bits(make_trainer, mine, tmp_path):
    settings = {"reward": "mine:brightness,mine:redness:-1,mine:Counts:0.5", "prompts": "animals"} | FEW_STEPS
    settings |= {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 2}
    whole = make_trainer(num_epochs=3, **settings)
    whole.train()
    make_trainer(num_epochs=2, output_dir=tmp_path / "again", **settings).train()
    again = make_trainer(num_epochs=3, output_dir=tmp_path / "again", resume_from=str(tmp_path / "again"), **settings)
    again.train()
    assert same_bits(trained_weights(whole), trained_weights(again))
    states = [
        checkpoint.read_training(checkpoint.find(trainer.output_dir))["reward_function"] for trainer in (whole, again)
    ]
    assert as_bytes(states[0]) == as_bytes(states[1])
    assert states[0]["spreads"]["mine:redness"]["count"] == 3 * 8
    records = [[without_timings(record) for record in metrics_of(trainer)] for trainer in (whole, again)]
    assert records[0] == records[1]


def test_another_reward_by_name_needs_another_folder(make_trainer, mine, tmp_path):
    make_trainer(reward="mine:brightness", num_epochs=1, **FEW_STEPS).train()
    with refused(ValueError, "reward is 'mine:redness', but the run"):
        make_trainer(reward="mine:redness", resume_from=str(tmp_path / "run"), **FEW_STEPS)
    trainer = make_trainer(
        reward="mine:redness,mine:Counts", resume_from=str(tmp_path / "run"), output_dir=tmp_path / "other", **FEW_STEPS
    )
    assert trainer.first_epoch == 1
