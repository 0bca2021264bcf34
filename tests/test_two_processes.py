"""Two processes over gloo: rows 7 and 8 of the table. TRL's replicas drift apart, and its first save hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import sys, torch
torch.set_num_threads(1)
from tiny_run import SETTINGS, brightness
from ddpo_fast import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from ddpo_fast.prompts import load_prompts
model, folder = sys.argv[1:]
for use_lora in (False, True):
    config = DDPOConfig(**SETTINGS | {"output_dir": f"{folder}/{use_lora}", "per_prompt_stat_tracking": True})
    pipeline = DefaultDDPOStableDiffusionPipeline(model, use_lora=use_lora)
    trainer = DDPOTrainer(config, brightness, load_prompts("animals"), pipeline)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    trained = torch.cat([p.detach().flatten() for p in trainer.engine.parameters])
    other = trainer.accelerator.gather(trained[None])
    assert torch.equal(other[0], other[1]), "the processes hold different weights"
    prompts = [p for batch in trainer._generate_samples(1, 4)[0] for p in batch.prompts]
    if trainer.accelerator.is_main_process:
        print("SAME", use_lora, len(trainer.stat_tracker.get_stats()))
"""


@pytest.mark.parametrize("launcher", ["torchrun"])
def test_processes_agree_and_save(launcher, model_dir, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), model_dir, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("SAME") == 2
    for kind in ("False", "True"):
        checkpoint = tmp_path / kind / "checkpoints" / "checkpoint_2"
        assert {"random_0.pt", "random_1.pt", "state.json", "training.pt"} <= {p.name for p in checkpoint.iterdir()}
        lines = (tmp_path / kind / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 2 + 4  # one writer: two epochs, four updates
