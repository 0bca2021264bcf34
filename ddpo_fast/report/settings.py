"""The settings of runs: those that are not defaults, and those in which runs differ."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from ddpo_fast.config import PLACE_FIELDS, DDPOConfig
from ddpo_fast.report.run_records import RunRecords

# what a run records for its own resumption, and where it was written
NOT_SHOWN = {*PLACE_FIELDS, "base", "import_folders", "measured", "prediction_type", "pretrained_revision"}
# defaults of what is recorded beside the fields of `DDPOConfig`
RECORDED = {"num_processes": 1, "reward_normalize": True, "reward_offload": False, "reward_process": False}
# values under such names stay private: a page is made to be shown
SECRET = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)
# Of all values of a table; longer ones are cut.
LONGEST = 300


def changed(run: RunRecords) -> list[tuple[str, str]]:
    """(name, value) of the settings that are not the default, in alphabetical order."""
    own = {option.name: option.default if option.default is not MISSING else {} for option in fields(DDPOConfig)}
    defaults = {**own, **RECORDED}
    return [(name, value) for name, value in listed(run) if name not in defaults or value != shown(defaults[name])]


def listed(run: RunRecords) -> list[tuple[str, str]]:
    """(name, value) of all settings that say something."""
    settings = {name: value for name, value in run.settings.items() if name not in NOT_SHOWN}
    return [(name, _value(name, settings[name])) for name in sorted(settings) if settings[name] not in (None, "", {})]


def differences(runs: Sequence[RunRecords]) -> list[tuple[str, list[str]]]:
    """(name, the value in each run) of the settings that are not the same in all runs."""
    names = sorted({name for run in runs for name in run.settings} - NOT_SHOWN)
    rows = [(name, [_value(name, run.settings.get(name)) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def shown(value: Any) -> str:
    """A value as the command line takes it, with what should stay private left out."""
    if isinstance(value, dict):
        value = {key: "(not shown)" if SECRET.search(str(key)) else item for key, item in value.items()}
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    text = {"null": "", "true": "yes", "false": "no"}.get(text, text)
    # an address's user and password
    text = re.sub(r"//[^/\s@]+@", "//", text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _value(name: str, value: Any) -> str:
    return "(not shown)" if value and SECRET.search(name) else shown(value)
