"""Records what `ddpo-fast plan` says of models of the published sizes, by their recipes: predicted, not measured.

    python bench/plans.py [--models NAME ...] [--output FILE.jsonl]

The models are those of lib/random_families.py, of which only the configs are written. docs/models.md has the results.
All together takes about five minutes on one core.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from lib import RECORDS, random_families, records
from lib.command_line import new_parser, print_progress

from ddpo_fast.commands import plan
from ddpo_fast.commands.options import PlanArguments, from_options, given_options, plan_parser
from ddpo_fast.config import DDPOConfig
from ddpo_fast.device_memory import GB
from ddpo_fast.families import with_family
from ddpo_fast.plan import choose
from ddpo_fast.prompts import PROMPT_LISTS

Row = dict[str, Any]
CASES = [
    ("sdxl", "--gpu_memory 12 --lora_rank 16"),
    ("sd3.5-medium", "--gpu_memory 16 --lora_rank 16"),
    ("sd3.5-medium", "--gpu_memory 16 --lora_rank 16 --quantize_frozen 8bit"),
    ("flux.1-dev", "--gpu_memory 24 --lora_rank 16"),
    ("flux.1-dev", "--gpu_memory 24 --lora_rank 16 --quantize_frozen 8bit"),
    ("flux.1-dev", "--gpu_memory 24 --lora_rank 16 --quantize_frozen 4bit"),
    ("sdxl", "--gpu_memory 80 --full-finetune --zero 2 --num-processes 2"),
    ("flux.1-dev", "--gpu_memory 80 --full-finetune"),
]
# of every case, as no other reward's memory is to be counted
COMMON = "--mixed_precision bf16 --reward jpeg_compressibility"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(random_families.FAMILIES), help="default: all")
    parser.add_argument("--output", type=Path, default=RECORDS / "plan-families.jsonl")
    options = parser.parse_args()
    facts = {"bench": "plan", "predicted": True, **records.facts("cpu")}
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in CASES:
            if options.models and name not in options.models:
                continue
            path = Path(folder) / name
            if not path.exists():
                random_families.save_configs(name, path)
            row = {"model": name, "options": arguments, **planned(path, arguments)}
            print_progress(f"{name} {arguments}: {row.get('chosen') or row['refused']}")
            records.append(options.output, [{**facts, **row}])


def planned(folder: Path, arguments: str) -> Row:
    """The plan for a model's folder: GB of each phase and the settings, or what it needs if it does not fit."""
    words = [*f"{arguments} {COMMON}".split(), "--pretrained_model", str(folder)]
    parsed = plan_parser().parse(words)
    machine = from_options(PlanArguments, parsed)
    case = plan.Case(parsed, given_options(words), parsed.full_finetune)
    configs = plan.configs_of(case.run, case.config)
    config: DDPOConfig = with_family(case.config, configs.family)
    reward = plan.memory_of_rewards(case.run, config, configs)
    footprint = plan.footprint_of(case.run, config, configs, parsed.full_finetune, reward)
    found = {"recipe": case.recipe.name, "gpu_gb": config.gpu_memory, "prompts": len(PROMPT_LISTS[case.run.prompts])}
    try:
        choice = choose(footprint, config, (config.gpu_memory or 0) * GB, machine.num_processes)
    except ValueError as error:
        (needed,) = re.findall(r"needs at least ([\d.]+) GB", str(error))
        return {**found, "needs_gb": float(needed), "refused": str(error)}
    return {
        **found,
        "total_gb": {phase: round(total / GB, 2) for phase, total in choice.plan.totals.items()},
        "chosen": choice.settings,
        "host_gb": round(choice.plan.host_bytes / GB, 2),
    }


if __name__ == "__main__":
    main()
