from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import pytest

from ddpo_fast.commands.recorded_run import RecordedRun
from ddpo_fast.prompts import PROMPT_LISTS, ListPrompts, PromptGroups, absolute, draw_prompts, load_prompts


@pytest.mark.parametrize("returned", ["a cat", ("a cat",), (1, {}), None, ("a", {}, 3)])
def test_bad_prompts_are_named(returned):
    with pytest.raises(ValueError, match="prompt function"):
        draw_prompts(lambda: returned, 2)


@pytest.mark.parametrize("spec", ["nothing", "no_such_module:f", "math:no_such_function", ":", "math:"])
def test_an_unknown_source_is_named(spec):
    with pytest.raises(ValueError, match="prompts"):
        load_prompts(spec)


# named lists


@pytest.mark.parametrize("name", PROMPT_LISTS)
def test_a_named_list_has_no_prompt_twice(name):
    prompts = PROMPT_LISTS[name]
    assert len(set(prompts)) == len(prompts)
    assert all(prompt == prompt.strip() != "" for prompt in prompts)
    assert load_prompts(name)()[0] in prompts


def test_named_lists_hold_what_their_sources_say():
    sizes = {name: len(prompts) for name, prompts in PROMPT_LISTS.items()}
    assert sizes == {
        "animals": 27, "simple_animals": 45, "imagenet_animals": 398, "nouns_activities": 135, "counting": 360,
        "tiny_animals": 76, "demo_animals": 4,
    }  # fmt: skip
    # ImageNet's classes by number
    numbers = {0: "tench", 1: "goldfish", 151: "Chihuahua", 207: "golden retriever", 281: "tabby", 397: "puffer"}
    assert {i: PROMPT_LISTS["imagenet_animals"][i] for i in numbers} == numbers
    assert {"a cat washing the dishes", "an ant riding a bike", "a kangaroo playing chess"} <= set(
        PROMPT_LISTS["nouns_activities"]
    )


def test_counted_animals_have_questions_and_their_answers():
    counting = load_prompts("counting")
    for prompt, metadata in (counting() for _ in range(500)):
        number, animals = metadata["answers"]
        assert prompt == f"{number} {animals}"
        assert metadata["questions"] == ["How many animals are there in this image?", "What animals are in this image?"]
    assert {"two mice", "nine butterflies", "three monkeys", "eight sheep", "five foxes"} <= set(counting.prompts)
    assert not {"one cat", "two mouses", "two flys"} & set(counting.prompts)


# drawing


def test_a_list_is_drawn_from_as_by_trl(tmp_path):
    """The golden losses depend on it."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "cat {i}", "id": {i}}}\n' for i in range(9)))
    prompts = load_prompts(str(tmp_path / "prompts.jsonl"))
    random.seed(5)
    expected = [random.choice([f"cat {i}" for i in range(9)]) for _ in range(30)]
    random.seed(5)
    drawn, metadata = PromptGroups(prompts, 1).draw(10)
    # a checkpoint keeps this state, from which a resumed run goes on
    state = random.getstate()
    draw_prompts(prompts, 7)
    random.setstate(state)
    drawn += draw_prompts(prompts, 20)[0]
    assert list(drawn) == expected
    assert [f"cat {row['id']}" for row in metadata] == expected[:10]


@pytest.mark.parametrize(("size", "processes"), [(10, 2), (10, 3), (3, 4), (1, 2)])
def test_processes_share_a_list_out(size, processes):
    prompts = ListPrompts([f"cat {i}" for i in range(size)], [{"id": i} for i in range(size)])
    rounds = 6 * processes
    shares = [
        list(islice(prompts.share(random.Random(3), process, processes), rounds * size // processes))
        for process in range(processes)
    ]
    assert all(prompt == f"cat {metadata['id']}" for share in shares for prompt, metadata in share)
    in_turn = [pair[0] for pairs in zip(*shares, strict=True) for pair in pairs]
    orders = [tuple(in_turn[start : start + size]) for start in range(0, rounds * size, size)]
    # each order has all items once, and no two orders are the same where they can differ
    assert all(len(set(order)) == size for order in orders)
    assert len(set(orders)) > 3 or size == 1


def test_all_orders_are_as_frequent():
    generator, counts = random.Random(0), {}
    for _ in range(60):
        prompts = [prompt for prompt, _ in islice(ListPrompts("abc").share(generator, 0, 1), 30)]
        for start in range(0, 30, 3):
            order = "".join(prompts[start : start + 3])
            counts[order] = counts.get(order, 0) + 1
    # 600 orders of 6 kinds: 100 of each, with a standard deviation of 9
    assert len(counts) == 6
    assert all(64 < count < 136 for count in counts.values())


# what a run records


def test_paths_are_recorded_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.csv", "animals", "data:x"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    folder = Path.cwd()
    assert absolute("prompts.csv") == str(folder / "prompts.csv")
    assert absolute("hf:folder:train[:9]#caption") == f"hf:{folder / 'folder'}:train[:9]#caption"
    assert absolute("hf:./folder") == f"hf:{folder / 'folder'}"
    assert absolute("data:x") == str(folder / "data:x")
    # these name no file
    for spec in ("animals", "hf:owner/name", "module:function", "nothing", ""):
        assert absolute(spec) == spec


def test_only_a_function_needs_trust(tmp_path):
    def needs_trust(spec):
        return list(RecordedRun("run", tmp_path, {"prompts": spec}, {})._needing_trust())

    (tmp_path / "a:b").touch()
    assert not any(needs_trust(spec) for spec in ("animals", "hf:owner/name:train#text", str(tmp_path / "a:b")))
    assert needs_trust("module:function") == [("prompts", "module:function")]
