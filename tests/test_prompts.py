from __future__ import annotations

import random

import pytest

from ddpo_fast.prompts import PROMPT_LISTS, draw_prompts, load_prompts


@pytest.mark.parametrize("returned", ["a cat", ("a cat",), (1, {}), None, ("a", {}, 3)])
def test_bad_prompts_are_named(returned):
    with pytest.raises(ValueError, match="prompt function"):
        draw_prompts(lambda: returned, 2)


def test_prompts_come_from_a_file_or_a_named_list(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\n two \n")
    assert {load_prompts(str(tmp_path / "prompts.txt"))()[0] for _ in range(50)} == {"one", "two"}
    random.seed(0)
    assert load_prompts("animals")()[0] in PROMPT_LISTS["animals"]
    assert "a lion" in PROMPT_LISTS["simple_animals"]
    assert len(PROMPT_LISTS["simple_animals"]) == 45
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="no prompt"):
        load_prompts(str(tmp_path / "empty.txt"))


@pytest.mark.parametrize("spec", ["nothing", "no_such_module:f", "math:no_such_function", ":", "math:"])
def test_an_unknown_source_is_named(spec):
    with pytest.raises(ValueError, match="prompts"):
        load_prompts(spec)
