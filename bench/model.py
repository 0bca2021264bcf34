"""Makes the model that `throughput.py` measures, unless it exists already, and prints its folder and its FLOPs.

    python bench/model.py [--device cpu|cuda] [--size tiny|full] [--output FILE.json]

On a GPU this is a Stable Diffusion 1.5 of random weights, which takes a while to make and is kept for later runs.
"""

from __future__ import annotations

import json
from pathlib import Path

from lib.command_line import add_device_and_size, new_parser
from lib.flops import flops_of
from lib.sd15_random import default_model


def main() -> None:
    parser = new_parser(__doc__)
    add_device_and_size(parser)
    parser.add_argument("--output", type=Path, help="write the same JSON there")
    options = parser.parse_args()
    folder = default_model(options.device, options.size)
    flops = {name: flops_of(folder, use_lora) for name, use_lora in (("full", False), ("lora", True))}
    line = json.dumps({"folder": str(folder), **flops})
    print(line)
    if options.output:
        options.output.write_text(line + "\n")


if __name__ == "__main__":
    main()
