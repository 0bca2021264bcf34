"""The command line: `ddpo-fast train`, `init`, `train-reward`, `plan`, `sample`, `report`, `recipes` and
`info`.

A command is a function in `COMMANDS`: it reads its options, which needs no torch, and then imports and runs its module
in `commands/`. So `--help` and a misspelt option are answered before the seconds that torch takes to import.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ddpo_fast.commands import library_warnings
from ddpo_fast.version import __version__

USAGE = """usage: ddpo-fast COMMAND [options]

Fine-tune Stable Diffusion with reinforcement learning.

  train         train a model on a reward, or go on with a run
  init          print a file of settings for train, with every option
  train-reward  train a reward on rated images, or on pairs with a preference
  sample        draw a trained run's images beside the base model's
  report        write a page about one run or several, or serve it while they go on
  plan          predict the memory that training takes, and choose settings that fit
  recipes       list the named sets of settings that train uses, or print one
  info          print what runs on this machine, and why the rest does not

`ddpo-fast COMMAND --help` lists a command's options."""
# an environment variable: set to anything, errors are shown with Python's traceback
TRACEBACK = "DDPO_FAST_TRACEBACK"
# exit statuses as shells give them: 128 plus the number of SIGINT or SIGPIPE
INTERRUPTED, BROKEN_PIPE = 130, 141


class Stopped(SystemExit):
    """Ends a command with exit status 2 after its error has been printed; `args` keeps the printed sentence."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.code = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the first word names, by default of the process's arguments.

    An error that a user can correct ends the command with one sentence and exit status 2.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        print(f"ddpo_fast {__version__}")
        return
    command, options = words[0], words[1:]
    try:
        with library_warnings.quiet_libraries():
            find_command(command)(options)
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of stdout has ended, as `head` does. Python flushes stdout at its exit, which would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except KeyboardInterrupt as error:
        # The trainer gives its interrupts an argument, after it has printed how to resume the run.
        if not error.args:
            print(f"\nddpo-fast {command}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        stop(f"ddpo-fast {command}" if command in COMMANDS else "ddpo-fast", error)


def find_command(name: str) -> Callable[[Sequence[str]], None]:
    """The command of that name. Raises `ValueError` naming the nearest one."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f": did you mean {near[0]}?" if near else f", only {', '.join(COMMANDS)}"
        raise ValueError(f"there is no command {name!r}{meant}")
    return COMMANDS[name]


def stop(program: str, error: Exception) -> NoReturn:
    """Prints an error in one line and raises `Stopped`; raises the error itself if `DDPO_FAST_TRACEBACK` is set."""
    if os.environ.get(TRACEBACK):
        raise error
    # some libraries' messages have many lines
    message = " ".join(str(error).split()) or type(error).__name__
    sentence = f"{program}: error: {message:.1000}"
    print(sentence, file=sys.stderr, flush=True)
    raise Stopped(sentence) from None


def train(arguments: Sequence[str]) -> None:
    from ddpo_fast.commands.options import train_parser
    from ddpo_fast.commands.settings_file import expanded

    parser = train_parser()
    words = expanded(arguments, parser)
    # for `--help` and misspelt options, which end here; `run` parses again, with a resumed run's defaults
    options = parser.parse(words)
    from ddpo_fast.commands import train

    train.run(words, options.dry_run)


def init(arguments: Sequence[str]) -> None:
    from ddpo_fast.commands import init

    print(init.settings_file(arguments), end="")


def train_reward(arguments: Sequence[str]) -> None:
    from ddpo_fast.commands.options import HeadArguments, from_options, train_reward_parser

    options = from_options(HeadArguments, train_reward_parser().parse(arguments))
    from ddpo_fast.commands import train_reward

    train_reward.run(options)


def plan(arguments: Sequence[str]) -> None:
    from ddpo_fast.commands.options import plan_parser
    from ddpo_fast.commands.settings_file import expanded

    parser = plan_parser()
    words = expanded(arguments, parser)
    options = parser.parse(words)
    from ddpo_fast.commands import plan

    plan.run(options, words)


def sample(arguments: Sequence[str]) -> None:
    from ddpo_fast.commands.options import sample_parser

    options = sample_parser().parse(arguments)
    from ddpo_fast.commands import sample

    sample.run(options)


def report(arguments: Sequence[str]) -> None:
    from ddpo_fast.commands.options import report_parser

    options = report_parser().parse(arguments)
    from ddpo_fast.commands import report

    report.run(options)


def info(arguments: Sequence[str]) -> None:
    from ddpo_fast.commands.options import info_parser

    info_parser().parse(arguments)
    from ddpo_fast.commands import info

    info.run()


def recipes(arguments: Sequence[str]) -> None:
    from ddpo_fast.commands.options import recipes_parser

    options = recipes_parser().parse(arguments)
    from ddpo_fast.commands import recipes

    recipes.run(options.recipe)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "init": init,
    "train-reward": train_reward,
    "plan": plan,
    "sample": sample,
    "report": report,
    "recipes": recipes,
    "info": info,
}


if __name__ == "__main__":
    main()
