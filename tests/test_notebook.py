"""docs/notebook.ipynb runs as it stands, and a kernel that is interrupted goes on with the same trainer."""

from __future__ import annotations

import io
import json
import sys
from base64 import b64decode
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from run_process import environment

from ddpo_fast.run_folder import notebook

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
# The trainer is that of the notebook. SIGINT is what the button for an interruption sends to the kernel.
INTERRUPTED = """
import os, signal
calls = []

def stopped_once(images, prompts, metadata):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return redness(images, prompts, metadata)

trainer.reward_fn = stopped_once
trainer.draw_reports, trainer.samples = lambda: None, None
trainer.train(1)
"""
SECOND = """
config.exp_name, config.num_epochs, config.sample_freq, config.sample_num_steps = "second", 1, 0, 2
config.sample_num_batches_per_epoch = 1
DDPOTrainer(config, redness, "animals", trainer.sd_pipeline).train()
"""


def run_cell(client: NotebookClient, source: str) -> dict:
    client.nb.cells.append(nbformat.v4.new_code_cell(source))
    return client.execute_cell(client.nb.cells[-1], len(client.nb.cells) - 1)


def shown_in(cell: dict) -> tuple[list[Image.Image], str]:
    """The pictures below a cell, and its text with that of its bars."""
    pictures, text = [], ""
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            pictures.append(Image.open(io.BytesIO(b64decode(data["image/png"]))))
        text += "".join(output.get("text", "")) + data.get("text/plain", "")
    return pictures, text


def epochs_of(folder: Path) -> list[int]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line["epoch"] for line in lines if line["kind"] == "epoch"]


def test_the_notebook_runs_is_interrupted_and_goes_on(tmp_path, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TQDM_DISABLE")
    given = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in given.cells)
    client = NotebookClient(given, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel():
        for at, cell in enumerate(given.cells):
            client.execute_cell(cell, at)
        (folder,) = (tmp_path / "logs").glob("redder-*")
        pictures, text = shown_in(next(cell for cell in given.cells if cell["id"] == "train"))
        # before and after each epoch, before beside after, and the curve
        assert len(pictures) == 6
        assert all(picture.width > 400 for picture in pictures)
        assert pictures[4].height > pictures[3].height
        assert "Epoch" in text
        bars = [state for state in client.widget_state.values() if state.get("_model_name") == "FloatProgressModel"]
        assert any(bar["value"] == bar["max"] == 3 and bar["bar_style"] == "success" for bar in bars)
        assert epochs_of(folder) == [0, 1, 2]
        assert (folder / "final" / "model_index.json").exists()

        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
            run_cell(client, INTERRUPTED)
        _, text = shown_in(client.nb.cells[-1])
        assert "checkpoint_3 is there: go on with train() again" in text
        run_cell(client, "trainer.train(1)")
        assert epochs_of(folder) == [0, 1, 2, 3]
        run_cell(client, SECOND)
        (second,) = (tmp_path / "logs").glob("second-*")
        assert epochs_of(second) == [0]


def test_nothing_is_shown_outside_of_a_notebook(tmp_path):
    assert not notebook.in_notebook()
    assert notebook.hides_bar(is_inner=True) is notebook.hides_bar(is_inner=False) is None
    loaded = "IPython.display" in sys.modules
    notebook.show_run(tmp_path)
    assert ("IPython.display" in sys.modules) == loaded
