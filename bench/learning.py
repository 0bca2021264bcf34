"""Compares how fast contenders learn: reward against images and seconds, TRL and ours, paired over seeds.

    python bench/learning.py [--contenders trl recipe ...] [--rewards NAME ...] [--kinds full lora] [--jobs N]
    python bench/learning.py --contender name=equal,step_credit=equal --contender name=safe,base=recipe,ema_decay=0.9
    python bench/learning.py --images 1920 --seeds 5                  long runs
    python bench/learning.py --show [--baseline recipe@lora]          tables and picture of the records, nothing is run

Contenders are `trl` (the demo's settings before there were recipes), `recipe` (that of the bundled model for the kind),
any recipe by its name, and settings of one's own by --contender: those of `base` (default: trl) and what differs.
`NAME@full` or `NAME@lora` is of that kind alone.

Every (contender, reward, seed, kind) is a process of its own, seed by seed, with the contenders in turn. A record is
written when a run ends, and a run whose record exists is skipped: after an interruption, give the same command again.

TRL's rewards are computed by our trainer at TRL's settings, which takes the same steps (tests/test_trl_parity.py); its
seconds are those of epochs of the trl package, measured in the same turns. --trl_package runs the package for whole
curves. Every record says which: `trainer` and `seconds_of`. Held-out evaluations draw fixed noise, of prompts that are
trained on and of others.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from lib import RECORDS
from lib.command_line import add_device_and_size, new_parser, print_progress
from lib.learning_contenders import BASELINE, KINDS, RECIPE, UnknownContender, contenders, forced_settings
from lib.learning_picture import draw
from lib.learning_report import CLOCKS, print_tables, summaries, with_seconds
from lib.learning_schedule import OtherRecord, planned, recorded, run_missing

REWARDS = ("jpeg_compressibility", "jpeg_incompressibility", "colour")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # the processes of runs are ended too, as by Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = 0
    if options.show:
        rows = recorded(options.records, lambda row: chosen(row, options))
    else:
        runs = list(planned(options, options.made))
        failed = run_missing(runs, options.jobs, 1 if options.jobs > 1 else None)
        paths = {run.path for run in runs}
        rows = [json.loads(path.read_text()) for path in sorted(paths) if path.exists()]
    if not any(row["bench"] == "learning" for row in rows):
        print_progress(f"no records in {options.records}")
        return 1
    report(with_seconds(rows, options.clock), options)
    return 1 if failed else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add_device_and_size(parser)
    # commas separate names too
    names: dict[str, Any] = {"type": lambda text: text.split(","), "nargs": "+", "metavar": "NAME"}
    add("--contenders", **names, help=f"default: {BASELINE} {RECIPE}, or {BASELINE} where --contender is given")
    add("--contender", action="append", default=[], metavar="name=NAME,setting=value,...", help="may be repeated")
    add("--rewards", **names, default=[list(REWARDS)], help=f"or module:function; default: {', '.join(REWARDS)}")
    add("--kinds", **names, default=[["full"]], help="full, lora or both (default: full)")
    add("--seeds", type=int, help="how many (default: 5, or 1 at tiny size)")
    add("--first_seed", type=int, default=0)
    add("--images", type=int, help="images that each run scores (default: 384, or 8 at tiny size)")
    add("--steps", type=int, help="denoising steps of all contenders (default: each one's own; trl has 20)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="of all contenders (default: each one's own)")
    add("--prompts", default="demo_animals", help="a named list or a file with a prompt on each line")
    add("--model", type=Path, help="folder of a pipeline (default: the bundled model)")
    add("--evaluate_every", type=int, help="images between held-out evaluations (default: 64, or 4 at tiny size)")
    add("--evaluation_images", type=int, help="images of an evaluation (default: 16, or 4 at tiny size)")
    add("--trl_package", action="store_true", help="compute trl's curves by the trl package too")
    add("--no_trl_seconds", action="store_true", help="do not time the trl package: trl's curves have no seconds then")
    add("--jobs", type=int, default=1, help="runs at a time; with more than one each has one thread")
    add("--quick", action="store_const", const="tiny", dest="size", help="the same as --size tiny")
    add("--records", type=Path, default=RECORDS / "learning", help="folder (default: bench/records/learning)")
    add("--show", action="store_true", help="run nothing; all contenders of the records unless some are named")
    add("--baseline", default=BASELINE, help=f"what the tables compare with: NAME or NAME@KIND (default: {BASELINE})")
    add("--clock", choices=CLOCKS, default="wall", help="processor: for a machine that others use (default: wall)")
    add("--output", type=Path, help="the summary (default: summary.json in the folder of records)")
    add("--plot", type=Path, help="the picture (default: learning.png there)")
    options = parser.parse_args(arguments)
    for name in ("contenders", "rewards", "kinds"):
        given = getattr(options, name)
        setattr(options, name, given and [word for words in given for word in words if word])
    tiny = options.size == "tiny"
    for name, quick, full in (
        ("seeds", 1, 5),
        ("images", 8, 384),
        ("evaluate_every", 4, 64),
        ("evaluation_images", 4, 16),
    ):
        if getattr(options, name) is None:
            setattr(options, name, quick if tiny else full)
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)} but must be at least 1")
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"--kinds has {', '.join(sorted(unknown))}: there are {', '.join(KINDS)}")
    if unknown := {name for name in options.rewards if name not in REWARDS and ":" not in name}:
        parser.error(
            f"--rewards has {', '.join(sorted(unknown))}: there are {', '.join(REWARDS)}, and 'module:function'"
        )
    if options.model is not None:
        options.model = options.model.resolve()
    if not options.show:
        named = options.contenders or ([BASELINE] if options.contender else [BASELINE, RECIPE])
        forced = forced_settings(options.size, options.steps, options.mixed_precision)
        try:
            options.made = contenders(named, options.contender, options.kinds, forced)
        except UnknownContender as error:
            parser.error(str(error))
    return options


def chosen(row: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether --show shows a record: all contenders and kinds, unless --contenders names some."""
    return row["bench"] == "seconds" or not options.contenders or row["contender"] in options.contenders


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    found = summaries(rows, options.baseline)
    print_tables(found, options.baseline)
    output = options.output or options.records / "summary.json"
    output.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    plot = options.plot or output.with_name("learning.png")
    draw(rows, plot)
    print_progress(f"summary: {output}\npicture: {plot}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OtherRecord as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on where this one stopped")
