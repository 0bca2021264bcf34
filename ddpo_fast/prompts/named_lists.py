"""Named lists of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddpo_fast.tiny_sd.drawings import ANIMALS, FACES, with_article

# the list of TRL's example script
TRL_ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion frog chicken duck goose bee pig turkey fly "
    "llama camel bat gorilla hedgehog kangaroo"
).split()

# the first 45 names of the bundled model's list are the animals of the DDPO paper
SIMPLE_ANIMALS = ANIMALS[:45]

# the activities of the DDPO paper (arXiv 2305.13301, section 5.2)
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")

# The classes 0 to 397 of ImageNet-1k are its animals, and the paper's list. The file has the first of each class's
# names in WordNet (as in the Apache-2.0 package timm), without an article, as in the paper's code.
IMAGENET_ANIMALS = Path(__file__).with_name("imagenet_animals.txt").read_text(encoding="utf-8").splitlines()

NUMBERS = "two three four five six seven eight nine".split()
PLURALS = {
    "sheep": "sheep",
    "deer": "deer",
    "fox": "foxes",
    "wolf": "wolves",
    "butterfly": "butterflies",
    "fish": "fish",
    "mouse": "mice",
    "goose": "geese",
    "fly": "flies",
}


def plural(animal: str) -> str:
    """The plural of one of `SIMPLE_ANIMALS`."""
    return PLURALS.get(animal, f"{animal}s")


def counted(number: str, animals: str) -> dict[str, Any]:
    """What a reward that asks a vision-language model about the image reads: questions, and the answer to each."""
    questions = ["How many animals are there in this image?", "What animals are in this image?"]
    return {"questions": questions, "answers": [number, animals]}


_COUNTS = [(number, plural(animal)) for animal in SIMPLE_ANIMALS for number in NUMBERS]

PROMPT_LISTS: dict[str, list[str]] = {
    "animals": TRL_ANIMALS,
    "simple_animals": [with_article(name) for name in SIMPLE_ANIMALS],
    "imagenet_animals": IMAGENET_ANIMALS,
    "nouns_activities": [f"{with_article(name)} {activity}" for name in SIMPLE_ANIMALS for activity in ACTIVITIES],
    "counting": [f"{number} {animals}" for number, animals in _COUNTS],
    "tiny_animals": [with_article(name) for name in [*ANIMALS, *(f"{name} face" for name in FACES)]],
    "demo_animals": [with_article(name) for name in ("lion", "penguin", "panda", "owl")],
}

# the metadata of each prompt, of the lists that have some
PROMPT_METADATA: dict[str, list[dict[str, Any]]] = {"counting": [counted(*count) for count in _COUNTS]}
