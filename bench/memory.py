"""Compares the memory that the plan predicts with the memory that training takes.

    python bench/memory.py --device cpu [--models bundled random sdxl sd35 flux_dev] [--kinds lora full]
                           [--precisions fp32 bf16] [--modes none selective blocks] [--micro 1 4]
                           [--engines plain 8bit ...] [--output FILE.jsonl]
    python bench/memory.py --cap GB --kinds full|lora [--device cuda] [--size full] [--steps 4] [--output FILE.jsonl]
    python bench/memory.py --show FILE.jsonl ...

The first command trains for two epochs in each combination of the options, each in a process of its own. By default
the plain engine runs in every combination, and the other engines run only where all weights are trained in bf16 without
checkpointing, in micro-batches of 4 pairs. Engines that `--engines` names run in every combination.

The second command plans for a GPU with the memory of `--cap` and trains for two epochs with the chosen settings, in a
process that cannot allocate more. Then it does the same for the whole GPU.

On a GPU the measurement is the peak of PyTorch's allocator, without the CUDA context. On a CPU it is the sum of the
tensors that exist before the first epoch and of every later allocation and release of PyTorch's CPU allocator, as its
profiler records them. That includes workspaces that ops allocate, but not the allocations of oneDNN and MKL themselves.
On a CPU, device memory and host memory are the same, so the prediction is the sum of the plan's figures for both.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lib import RECORDS, ROOT, records
from lib.call_costs import peak_of_cpu_allocations
from lib.command_line import add_device_and_size, new_parser
from lib.run_trainer import SeededPrompts, timed_epoch
from lib.sd15_random import default_model
from lib.workloads import EXAMPLE, FULL_RATE, NEVER, TINY, prompts

from ddpo_fast.config import DDPOConfig
from ddpo_fast.device_memory import CUDA_CONTEXT, GB
from ddpo_fast.engine import compute_dtype
from ddpo_fast.model_configs import check_model
from ddpo_fast.plan import Adapter, Footprint, choose, predict
from ddpo_fast.rewards import jpeg_compressibility

Row = dict[str, Any]
# the tests' models with random weights: Stable Diffusion's kind, and those of other families
RANDOM = ("random", "sdxl", "sd35", "flux_dev")
PRECISIONS = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}
# settings of the engine, which turns gradients into weights
ENGINES: dict[str, Row] = {
    "plain": {},
    "8bit": {"train_use_8bit_adam": True},
    "half": {"train_gradient_dtype": "half"},
    "stochastic": {"stochastic_rounding": True, "train_use_8bit_adam": True},
    "ema": {"ema_decay": 0.99},
    "offload": {"offload": "optimizer", "train_use_8bit_adam": True},
    # With this engine each update is a single micro-batch. The norm is a string, because JSON has no infinity.
    "in_backward": {"optimizer_in_backward": True, "train_max_grad_norm": "inf"},
}
# kind, precision, checkpointing and pairs of the combination that all engines train
ENGINES_COMPARED_AT = ("full", "bf16", "none", 4)
# At tiny size a cap is multiplied by this: roughly the bundled model's weights over Stable Diffusion's, with room for
# activations.
TINY_SCALE = 1 / 50
OUT_OF_MEMORY = "out of memory"


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(trained(json.loads(options.child))))
    elif options.show:
        show(records.read(options.show))
    else:
        rows = list(capped(options) if options.cap else combinations(options))
        facts = {"bench": "memory", **records.facts(options.device)}
        records.append(options.output, ({**facts, **row} for row in rows))
        show(rows)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_device_and_size(parser)
    parser.add_argument("--models", nargs="+", choices=["bundled", *RANDOM], default=["bundled", "random"])
    parser.add_argument("--kinds", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["fp32", "bf16"])
    parser.add_argument("--modes", nargs="+", default=["none", "selective", "blocks"], help="of checkpointing")
    parser.add_argument("--micro", nargs="+", type=int, default=[1, 4], help="pairs of a micro-batch")
    parser.add_argument(
        "--engines", nargs="+", choices=list(ENGINES), help="settings of the engine (default: see above)"
    )
    parser.add_argument(
        "--cap", type=float, metavar="GB", help="memory of a GPU to plan for; at tiny size a fiftieth of it"
    )
    parser.add_argument("--steps", type=int, default=4, help="denoising steps")
    parser.add_argument("--show", nargs="+", type=Path, help="print records and run nothing")
    parser.add_argument("--output", type=Path, default=RECORDS / "memory.jsonl")
    # for the processes that this script starts
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def combinations(options: argparse.Namespace) -> Iterable[Row]:
    """A row for each combination of the options, without a cap."""
    chosen = product(options.models, options.kinds, options.precisions, options.modes, options.micro)
    for model, kind, precision, mode, micro in chosen:
        every = list(ENGINES) if (kind, precision, mode, micro) == ENGINES_COMPARED_AT else ["plain"]
        for engine in options.engines or every:
            settings = {
                **EXAMPLE,
                **TINY,
                "sample_batch_size": 4,
                "train_batch_size": 4,
                "sample_num_steps": options.steps,
                "mixed_precision": PRECISIONS[precision],
                "gradient_checkpointing": mode,
                "train_micro_batch_size": 4 * options.steps if engine == "in_backward" else micro,
                "sample_merge_batches": 2,
                **ENGINES[engine],
            }
            if model in RANDOM:
                # FLUX's own size is 128 latents a side, whatever the model's
                settings |= {"height": 16, "width": 16}
            spec = spec_of(options, kind, settings, model)
            yield {"model": model, "kind": kind, "precision": precision, "engine": engine, **in_a_process(spec)}


def spec_of(options: argparse.Namespace, kind: str, settings: Row, model: str = "") -> Row:
    # The plan predicts training on all pairs, so none may be skipped. The profiler does not see work in another thread,
    # so rewards must not overlap with sampling. How many prompts are kept follows from the number of epochs.
    fixed = {"train_skip_dead_pairs": False, "reward_overlap": False, "num_epochs": 2}
    fixed |= {"save_freq": NEVER, "train_learning_rate": FULL_RATE}
    settings = {**settings, **fixed}
    return {"device": options.device, "kind": kind, "settings": settings, "model": model, "size": options.size}


def capped(options: argparse.Namespace) -> Iterable[Row]:
    """For each kind of training a row with the cap and one for the whole GPU."""
    for kind in options.kinds:
        half = {"lora": "fp16", "full": "bf16"}[kind] if options.device == "cuda" else "no"
        example = {**EXAMPLE, "mixed_precision": half, "sample_num_steps": options.steps}
        if options.size == "tiny":
            example |= {**TINY, "sample_num_steps": options.steps}
        spec = spec_of(options, kind, example)
        cap = options.cap * (TINY_SCALE if options.size == "tiny" else 1)
        within = in_a_process({**spec, "cap": cap})
        whole = in_a_process({**spec, "cap": None})
        ratio = within["epoch_s"] / whole["epoch_s"] if within["epoch_s"] and whole["epoch_s"] else None
        for row in ({**within, "over_uncapped": ratio}, whole):
            yield {"kind": kind, "size": options.size, **row}


def in_a_process(spec: Row) -> Row:
    """What `trained` returns in a process of its own, also where it ran out of memory."""
    variables = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if spec["device"] == "cuda":
        variables.pop("OMP_NUM_THREADS")
    command = [sys.executable, str(Path(__file__)), "--child", json.dumps(spec)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{spec}\n{done.stderr[-3000:]}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def trained(spec: Row) -> Row:
    """Trains for two epochs: their measured peak and the predicted one, and the seconds of the second."""
    device, cap = spec["device"], spec.get("cap")
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(spec, Path(folder))
        settings = {name: float(value) if value == "inf" else value for name, value in spec["settings"].items()}
        config = DDPOConfig(output_dir=f"{folder}/run", **settings)
        adapter = Adapter() if spec["kind"] == "lora" else None
        footprint = Footprint(
            check_model(str(model)),
            adapter,
            compute_dtype(config.mixed_precision),
            device,
            config.fuse_unet,
            config.sample_num_steps,
            size=config.image_sizes[0],
            prompts=len(set(prompts())),
        )
        chosen: Row = {}
        if "cap" in spec:
            # without a cap, a CPU counts as 64 GB, at which no memory needs to be saved
            capacity = cap * GB if cap else torch.cuda.mem_get_info()[1] if device == "cuda" else 64 * GB
            chosen = choose(footprint, config, capacity, evaluated_images=0).settings
            config = DDPOConfig(**{**vars(config), **chosen})
        plan = predict(footprint, config, evaluated_images=0)
        if cap and device == "cuda":
            share = (cap * GB - CUDA_CONTEXT) / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(share)
        host = sum(plan.host.values())
        predicted = plan.allocated + (host if device == "cpu" else 0)
        found = {"cap_gb": cap, "chosen": chosen, "settings": spec["settings"], "predicted_bytes": predicted}
        found |= {"predicted_phase": plan.peak_phase, "host_bytes": host}
        try:
            measure = on_cuda if device == "cuda" else on_cpu
            found |= measure(lambda: trainer_of(config, model, adapter is not None))
        except torch.OutOfMemoryError as error:
            return {**found, "failed": f"{OUT_OF_MEMORY}: {str(error)[:300]}", "epoch_s": None, "error": None}
    return {**found, "failed": None, "error": predicted / found["measured_bytes"] - 1}


def model_of(spec: Row, folder: Path) -> Path:
    if spec["model"] not in RANDOM:
        return default_model(spec["device"], "tiny" if spec["model"] == "bundled" else spec["size"])
    sys.path.append(str(ROOT / "tests"))
    import tiny_models

    made = tiny_models.build_pipeline() if spec["model"] == "random" else tiny_models.MODELS[spec["model"]]()
    made.save_pretrained(folder / "model")
    return folder / "model"


def trainer_of(config: DDPOConfig, model: Path, use_lora: bool) -> Any:
    from ddpo_fast.pipeline import DefaultDDPOStableDiffusionPipeline
    from ddpo_fast.trainer import DDPOTrainer
    from ddpo_fast.unet import set_gradient_checkpointing

    pipeline = DefaultDDPOStableDiffusionPipeline(str(model), use_lora=use_lora)
    trainer = DDPOTrainer(config, jpeg_compressibility, SeededPrompts(prompts(), config.seed), pipeline)
    set_gradient_checkpointing(trainer.sd_pipeline.unet, config.gradient_checkpointing)
    (trainer.sd_pipeline.vae.enable_slicing if config.vae_slicing else trainer.sd_pipeline.vae.disable_slicing)()
    return trainer


def two_epochs(trainer: Any) -> float:
    """Seconds of the second."""
    global_step, _ = timed_epoch(trainer, 0, 0)
    return timed_epoch(trainer, 1, global_step)[1]


def on_cuda(make: Callable[[], Any]) -> Row:
    seconds = two_epochs(make())
    return {
        "measured_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "epoch_s": seconds,
    }


def on_cpu(make: Callable[[], Any]) -> Row:
    before = tensor_bytes()
    trainer = make()
    held = tensor_bytes() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        # slowed down by the profiler, so these seconds compare only with others of this script
        seconds = two_epochs(trainer)
    return {
        "measured_bytes": held + peak_of_cpu_allocations(profile),
        "reserved_bytes": None,
        "epoch_s": seconds,
    }


def tensor_bytes() -> int:
    """Bytes of all tensors on the CPU that the garbage collector knows; those that share a storage count once."""
    gc.collect()
    sizes = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
                storage = thing.untyped_storage()
                sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def show(rows: list[Row]) -> None:
    for row in rows:
        settings = {**row["settings"], **row["chosen"]}
        names = [str(row.get(name)) for name in ("model", "kind", "engine") if row.get(name)]
        where = f"cap {row['cap_gb']:g} GB" if row["cap_gb"] else "no cap"
        words = [*names, settings["mixed_precision"], settings.get("gradient_checkpointing", "none"), where]
        line = f"{' '.join(words)}, {settings.get('train_micro_batch_size')} pairs: "
        if row["failed"]:
            print(f"{line}FAILED {row['failed']}")
            continue
        line += f"predicted {row['predicted_bytes'] / 1e6:,.2f} MB, measured {row['measured_bytes'] / 1e6:,.2f} MB "
        line += f"({100 * row['error']:+.1f} %), {row['epoch_s']:.2f} s"
        if row.get("over_uncapped"):
            line += f", {row['over_uncapped']:.2f} times the time without a cap"
        print(line)
        if row["chosen"]:
            print("    " + ", ".join(f"{name}={value}" for name, value in row["chosen"].items()))


if __name__ == "__main__":
    main()
