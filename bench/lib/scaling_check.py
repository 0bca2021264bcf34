"""Checks the formulas of `scaling_model.py`: predicts an epoch on two processes here, and measures it.

The processes train the bundled model on the CPU and exchange gradients over gloo. Each of them runs
`python -m lib.scaling_check FOLDER`, see `worker`.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from lib import python_path, records
from lib.scaling_model import SINGLE, Links, Model, Rates, Row, Work, communication_s, epoch_s, sent_bytes
from lib.timing import Clock
from lib.workloads import NEVER

# The trainer's settings, and the work that they amount to. Ratios stay within a clip range of 1.0: the trainer may skip
# pairs whose ratio is clipped, and runs would then do unequal work. The rate of training includes the optimizer.
CHECKED = {"sample_num_steps": 10, "sample_batch_size": 8, "sample_num_batches_per_epoch": 1, "train_batch_size": 4}
CHECKED |= {"train_micro_batch_size": 4, "train_clip_range": 1.0, "train_learning_rate": 1e-5, "save_freq": NEVER}
WORK = Work(images=8, steps=10, updates=2, pairs=4)


class AllReduces(TorchDispatchMode):
    """Counts this process's all-reduces and their bytes."""

    calls, bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("c10d::allreduce"):
            self.calls += 1
            self.bytes += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


def worker(folder: Path) -> None:
    """Trains all weights of the bundled model for an epoch at each line of stdin, and prints the epoch's figures."""
    from ddpo_fast import rewards
    from ddpo_fast.commands.options import RunArguments
    from ddpo_fast.commands.train import make_pipeline
    from ddpo_fast.config import DDPOConfig
    from ddpo_fast.prompts import load_prompts
    from ddpo_fast.trainer import DDPOTrainer

    # what libraries print must not be read as an answer
    answers, sys.stdout = sys.stdout, sys.stderr
    config = DDPOConfig(**CHECKED, mixed_precision="no", output_dir=str(folder))
    pipeline, reward = make_pipeline(RunArguments(full_finetune=True)), rewards.load("jpeg_compressibility")
    trainer = DDPOTrainer(config, reward, load_prompts("simple_animals"), pipeline)
    figures, reduced, step = {"weights": sum(p.numel() for p in pipeline.unet.parameters())}, AllReduces(), 0
    for epoch, _ in enumerate(sys.stdin):
        # Counting takes time, so only the first epoch counts. It warms up, and its times are not used.
        with reduced if epoch == 0 else nullcontext():
            step = trainer.step(epoch, step)
        if trainer.accelerator.is_main_process:
            last = json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
            figures["parts"] = [last[f"{part}_s"] for part in ("sample", "reward", "train")]
        links = all_reduce_rates() if dist.is_initialized() else {}
        figures |= {"calls": reduced.calls, "bytes": reduced.bytes, **links}
        print(json.dumps(figures), file=answers, flush=True)


def all_reduce_rates() -> dict[str, float]:
    """Between two processes: seconds of a hop, and bytes/s beyond it, from all-reduces of 1 KiB and of 4 MiB."""
    # 1 KiB and not a single number, for which gloo takes fewer steps. Means and not medians: on busy CPUs a few
    # all-reduces take many times as long as the others, and they do so in training too.
    clock, size = Clock("cpu"), 2**22
    calls = [partial(dist.all_reduce, torch.zeros(count)) for count in (256, size // SINGLE)]
    small_s, large_s = (clock.sample(call, 100) / 1e6 for call in calls)
    return {"hop_s": small_s / 2, "bytes_per_s": size / (large_s - small_s)}


def start(folder: Path, variables: dict[str, str]) -> Popen:
    """Starts a process that runs `worker`, on the CPU and with one thread."""
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **quiet, **variables}
    environment["PYTHONPATH"] = python_path()
    command = [sys.executable, "-m", "lib.scaling_check", str(folder)]
    return Popen(command, env=environment, stdin=PIPE, stdout=PIPE, text=True)


def epochs_of(workers: list[Popen]) -> list[Row]:
    """Has each worker train an epoch, all at the same time, and returns their figures."""
    for process in workers:
        print(file=process.stdin, flush=True)
    if not all(answers := [process.stdout.readline() for process in workers]):
        sys.exit("a process of the check failed: its error is printed above")
    return [json.loads(answer) for answer in answers]


def checked(workers: list[Popen]) -> Row:
    """Measures an epoch of one process alone, of two that train independently beside each other, and of two that train
    together; and predicts the last from the other two.

    Two that train together wait for each other, so the slower one's rates count.
    """
    alone, beside, (together, _) = epochs_of(workers[:1]), epochs_of(workers[:2]), epochs_of(workers[2:])
    model = Model(together["weights"], together["weights"], 0, 0)
    links = Links(*[together["bytes_per_s"]] * 2, *[together["hop_s"]] * 2)
    row = {**together, "measured_s": sum(together["parts"])}
    for name, runs in (("alone", alone), ("beside", beside)):
        sample_s, reward_s, train_s = map(max, zip(*[run["parts"] for run in runs], strict=True))
        rates = Rates(WORK.rows / sample_s, WORK.rows / train_s, reward_s / WORK.images, 0, "measured")
        row |= {name: [run["parts"] for run in runs], f"from_{name}_s": epoch_s(0, model, WORK, rates, 2, links)}
        row[f"{name}_error"] = row[f"from_{name}_s"] / row["measured_s"] - 1
    row["foretold_bytes"] = WORK.updates * sent_bytes(0, model, WORK.micro_batches, 2)
    return {**row, "communication_s": WORK.updates * communication_s(0, model, WORK.micro_batches, 2, links)}


def check(rounds: int, output: Path | None) -> None:
    """Compares prediction and measurement in rounds, prints both, and appends the rows to the records."""
    facts, rows = {"settings": CHECKED, **records.facts("cpu"), "threads": 1}, []
    output = output or records.default_file("scaling", facts["device"])
    print("seconds of an epoch on two processes: measured; predicted from two independent ones; from one alone")
    line = "{measured_s:.3f}; {from_beside_s:.3f} ({beside_error:+.1%}); {from_alone_s:.3f} ({alone_error:+.1%})"
    line += "; communication {communication_s:.3f}, {bytes} bytes ({foretold_bytes:.0f} predicted)"
    pair = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29519"}
    ranks = [{}, {}, *({"RANK": rank, "LOCAL_RANK": rank, **pair} for rank in "01")]
    with TemporaryDirectory() as temporary:
        workers = [start(Path(temporary, str(number)), variables) for number, variables in enumerate(ranks)]
        try:
            # warms up
            checked(workers)
            for number in range(1, rounds + 1):
                rows.append({"round": number, **checked(workers), **facts})
                print(line.format(**rows[-1]), flush=True)
        finally:
            for process in workers:
                process.kill()
                process.wait()
    records.append(output, rows)
    print("median errors:", *(f"{median(r[k] for r in rows):+.1%}" for k in ("beside_error", "alone_error")), output)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
