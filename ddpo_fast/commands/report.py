"""`ddpo-fast report`: a page about one or more runs, as a file, or live while they go on. It needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ddpo_fast.report import page, serve
from ddpo_fast.report.run_records import read_all


def run(options: argparse.Namespace) -> None:
    """Writes the page, or serves it; `ValueError` for a folder without a run, or an output that cannot be written."""
    folders = [Path(name).expanduser() for name in options.runs]
    # a run that is named twice is one run
    folders = list({folder.resolve(): folder for folder in folders}.values())
    if options.watch:
        if options.output is not None:
            raise ValueError("--watch serves the page and writes no file: leave out --output")
        serve.watch(folders, options.port)
        return
    if options.port:
        raise ValueError(f"--port is {options.port}, which only --watch uses: add that, or leave it out")
    read_all(folders)
    path = page.default_path(folders) if options.output is None else options.output.expanduser()
    page.write(folders, path)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
