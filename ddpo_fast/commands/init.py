"""`ddpo-fast init`: a commented file of settings for `ddpo-fast train`. This module does not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from ddpo_fast.commands.options import (
    RunArguments,
    apply_bundled_scorer,
    apply_recipe,
    check_no_lora_options,
    from_options,
    given_options,
    train_parser,
)
from ddpo_fast.commands.settings_file import expanded, written
from ddpo_fast.recipes import LORA_SETTINGS

# of the user's, which belongs in no file
TOKEN = "hf_user_access_token"
# what the file sets, beside the options that are given
ALWAYS = ("pretrained_model", "full_finetune", "reward", "prompts", "num_epochs")


def settings_file(arguments: Sequence[str]) -> str:
    """The text of a settings file with the options that are given; the others are comments with their values.

    Raises `ValueError` as `train` does for options that are wrong.
    """
    parser = train_parser()
    words = expanded(arguments, parser)
    options, given = parser.parse(words), given_options(words)
    check_no_lora_options(given, options.full_finetune)
    apply_bundled_scorer(options)
    names_recipe = bool(options.recipe)
    recipe = apply_recipe(options, given)
    from_options(RunArguments, options)
    left_out = {
        "local_rank",
        "resume_from",
        "trust_run",
        "dry_run",
        TOKEN,
        *(LORA_SETTINGS if options.full_finetune else ()),
    }
    values = {name: value for name, value in vars(options).items() if name not in left_out}
    if not names_recipe:
        # it is chosen by the model
        values["recipe"] = ""
    heading = (
        "Settings for `ddpo-fast train FILE.yaml`; options on the command line replace them.",
        f"A line that begins with # has the value of recipe {recipe.name}, or the default: remove the # to set it.",
    )
    return written(parser, values, given | set(ALWAYS), heading)
