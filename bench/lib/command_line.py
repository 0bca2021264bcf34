"""Options that several scripts have, and messages about their progress."""

from __future__ import annotations

import argparse
import sys

import torch


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose --help shows the description with its line breaks."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_device_and_size(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default, help="default: cuda where there is one")
    parser.add_argument("--size", choices=["tiny", "full"], default="full", help="tiny: to see the script run")


def print_progress(text: str) -> None:
    """Prints to stderr, as stdout is for tables and results."""
    print(text, file=sys.stderr, flush=True)
