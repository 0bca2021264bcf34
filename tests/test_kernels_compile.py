"""Every kernel compiles for sm_80 and sm_90 without a GPU, spills no registers, and sums in one order."""

from __future__ import annotations

import os
import re
import shutil
import sys

import pytest
from run_process import ROOT, finish, read_records

from ddpo_fast.ops import extension

# one process makes the rows for all of them


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    output = tmp_path_factory.mktemp("compiled") / "kernels.json"
    # with TRITON_INTERPRET set, kernels are wrapped for the interpreter and cannot be compiled
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # each kernel for both architectures and each of its sizes in each precision, but not all of it for both
    command = [sys.executable, ROOT / "bench" / "compile_kernels.py", "--thin", "--output", output]
    print(finish(command, env=environment).stdout)
    return read_records(output)


def test_every_kernel_is_compiled_for_both_architectures(rows):
    kernels = set()
    for path in (ROOT / "kernels" / "ddpo_fast_kernels").glob("*.py"):
        kernels |= {(path.stem, kind) for kind in re.findall(r"def \w+_(fwd|bwd)_kernel", path.read_text())}
    assert len(kernels) >= 9
    for architecture in (80, 90):
        assert {(r["op"], r["kernel"].split()[0]) for r in rows if r["sm"] == architecture} == kernels


def test_no_registers_spill(rows):
    assert [r for r in rows if r["spilled_bytes"]] == []


def test_blocks_fit_the_hardware(rows):
    for row in rows:
        assert row["registers"] * row["warps"] * 32 <= 65536, row
        assert row["shared_bytes"] <= 160 * 1024, row


def test_sampling_and_training_sum_in_the_same_order(rows):
    """The layout of the tensor that is summed decides the order, so equal layouts give equal bits."""

    def orders(op, kind):
        return {
            (r["sm"], *re.search(r"(fp\d+|bf16) (guided|plain).*?(contiguous|channels_last)", r["kernel"]).groups()): r[
                "sums"
            ][0]
            for r in rows
            if r["op"] == op and kind in r["kernel"]
        }

    sampling, training = orders("step_logprob", "fwd"), orders("ppo_loss", "fwd")
    shared = sampling.keys() & training.keys()
    assert len(shared) >= 8
    assert {k: sampling[k] for k in shared} == {k: training[k] for k in shared}


def test_every_multiply_add_is_fused_explicitly(rows):
    """The compiler might fuse a multiplication and an addition in one kernel only, and round differently."""
    forward = [r for r in rows if r["op"] in ("step_logprob", "ppo_loss") and r["kernel"].startswith("fwd")]
    assert len(forward) > 10
    assert [r["kernel"] for r in forward if r["contractible"]] == []


@pytest.mark.parametrize("op", ["add_layernorm", "geglu", "groupnorm_silu"])
def test_activations_are_indexed_in_64_bits(rows, op):
    """96 images of 4096 pixels and 5120 channels have 2e9 elements, which is near 2^31."""
    offsets = [r["offsets"] for r in rows if r["op"] == op]
    assert offsets
    assert all("i64" in found for found in offsets)


def test_the_last_program_reads_what_the_others_stored(rows):
    """The atomic counters have acquire-release order, so the last program sees the stores of all others.

    One thread of a program increments a counter, when all its threads have stored.
    """
    counting = [r for r in rows if r["atomics"]]
    assert {r["op"] for r in counting} == {"ppo_loss", "add_layernorm", "geglu", "groupnorm_silu"}
    for row in counting:
        assert all(".acq_rel" in atomic for atomic in row["atomics"]), row
        assert row["barriers"], row


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cpp_and_cuda_compile(tmp_path):
    """With the installed torch's headers; DDPO_FAST_TORCH_HEADERS="2.11.0 2.13.0" adds others, of 80 MB each."""
    versions = ["installed", *os.environ.get("DDPO_FAST_TORCH_HEADERS", "").split()]
    output = tmp_path / "sources.jsonl"
    finish([sys.executable, ROOT / "bench" / "compile_cuda.py", "--torch", *versions, "--output", output])
    rows = read_records(output)
    sources = {path.name for kind in ("*.cu", "*.cpp") for path in extension.CSRC.glob(kind)}
    assert {(row["torch"], row["source"]) for row in rows} == {(v, source) for v in versions for source in sources}
    for row in rows:
        if row["source"].endswith(".cu"):
            assert len(row["kernels"]) >= 2 * 3, "every dtype for both architectures"
        assert not any(kernel["spilled_bytes"] for kernel in row["kernels"])
