"""`python ddpo_fast/train.py`, under `accelerate launch` too: the same program as `ddpo-fast train`."""

import sys
from pathlib import Path

# run as a script, this folder is the first place that imports look in, and its module names are ours alone
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from ddpo_fast.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
