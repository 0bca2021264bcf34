"""`ddpo-fast recipes`: the recipes and what each is for, or the file of one."""

from __future__ import annotations

import sys
import textwrap

from ddpo_fast import recipes


def run(name: str | None) -> None:
    """Prints every recipe's description or, after checking it, the file of the recipe `name`.

    Raises `ValueError` for a name or a file that is no recipe.
    """
    if name is not None:
        recipes.load(name)
        sys.stdout.write(recipes.path_of(name).read_text(encoding="utf-8"))
        return
    for recipe in map(recipes.load, recipes.names()):
        print(f"{recipe.name}\n{textwrap.fill(recipe.description, 100, initial_indent='  ', subsequent_indent='  ')}")
    print(
        "\n`ddpo-fast train --recipe NAME` uses one, also by the path of a YAML file of your own. "
        "`ddpo-fast recipes NAME`\nprints a recipe's file, with the reason for each setting: to change it, write it "
        "into a file of your own."
    )
