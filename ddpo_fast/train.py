"""`python ddpo_fast/train.py`, under `accelerate launch` too: the same program as `ddpo-fast train`."""

import sys
from pathlib import Path

# Run as a script, this folder is the first entry of `sys.path`, where a module such as `prompts` would hide one of the
# same name elsewhere.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from ddpo_fast.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
