"""The one door: which backend runs, and why another does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_process import finish
from step_example import step_example

from ddpo_fast import ops
from ddpo_fast.ops import backend, extension

ROOT = Path(__file__).parents[1]


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python without the interpreter's switch and with nothing else of this process."""
    paths = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONPATH": str(ROOT / "kernels")}
    return finish([sys.executable, "-c", code], env=paths | environment, cwd=ROOT)


def test_every_backend_runs_here_when_asked_for():
    """No test of a backend may pass because the backend is missing."""
    for op in backend.OPS.values():
        for name, implementation in op.implementations.items():
            if implementation is not None:
                assert op.reasons(name, "cpu", torch.float32, forced=True) == ""


def test_every_op_is_defined_in_plain_pytorch_and_says_what_it_lacks():
    for name, running, reasons in ops.status("cpu"):
        assert running in ops.BACKENDS
        assert set(reasons) | {running} == set(ops.BACKENDS) or running != "reference", name
        assert all(reasons.values())


def test_a_forced_backend_is_the_one_that_runs(monkeypatch):
    ran = []
    op = backend.OPS["step_logprob"]
    for name, implementation in op.implementations.items():
        spy = lambda *a, _name=name, _run=implementation: (ran.append(_name), _run(*a))[1]  # noqa: E731
        monkeypatch.setitem(op.implementations, name, spy)
    for name in ops.BACKENDS:
        with ops.force_backend(name):
            ops.step_logprob(*step_example().arguments())
    monkeypatch.setenv(backend.VARIABLE, "reference")
    ops.step_logprob(*step_example().arguments())
    assert ran == ["triton", "csrc", "reference", "reference"]


def test_interpreted_kernels_and_fp64_are_not_chosen_by_themselves():
    op = backend.OPS["step_logprob"]
    assert op.backend("cpu", torch.float32) == "csrc"
    assert op.backend("cpu", torch.float64) == "reference"
    assert "TRITON_INTERPRET" in op.reasons("triton", "cpu", torch.float32)


def test_a_backend_that_cannot_run_is_refused_with_its_reason():
    with ops.force_backend("csrc"), pytest.raises(RuntimeError, match="float64 is computed by the reference only"):
        backend.OPS["step_logprob"].backend("cpu", torch.float64)


def test_an_op_without_the_chosen_backend_takes_another():
    op = backend.OPS["geglu"]
    with ops.force_backend("csrc"):
        assert op.backend("cpu", torch.float32) == "reference"


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        ops.use_backend("cuda")
    monkeypatch.setenv(backend.VARIABLE, "fast")
    with pytest.raises(ValueError, match="DDPO_FAST_BACKEND is 'fast'"):
        ops.step_logprob(*step_example().arguments())


INFO = "from ddpo_fast.cli import main; main(['info'])"


def test_info_without_a_compiler(tmp_path):
    """Everything works, and each backend that does not says why."""
    done = in_process(INFO, PATH="/nonexistent", DDPO_FAST_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found" in done.stdout
    assert "Triton has no compiler for cpu" in done.stdout
    assert "step_logprob" in done.stdout
    assert "ppo_loss" in done.stdout


def test_info_with_a_compiler_that_fails(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'no such thing as a compiler' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = in_process(INFO, PATH=f"{tmp_path}:/usr/bin:/bin", DDPO_FAST_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "no such thing as a compiler" in done.stdout


def test_a_library_is_compiled_once_and_again_when_the_compiler_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPO_FAST_CACHE", str(tmp_path))
    first = extension.build("cpu")
    made = first.stat().st_mtime_ns
    assert extension.build("cpu") == first
    assert first.stat().st_mtime_ns == made
    monkeypatch.setenv("CXX", "g++ -DOTHER")
    assert extension._key(extension._cpu_command(), "cpu") not in first.name
    assert [p.name for p in tmp_path.iterdir()] == [first.name], "nothing is left of the compilation"


def test_cpp_checks_at_its_boundary():
    assert extension.reasons("cpu") == ""
    example = step_example()
    made = torch.empty_like(example.latents), torch.empty(2), torch.empty_like(example.model_output)
    step = torch.ops.ddpo_fast_csrc.step_logprob
    step(*example.arguments(), *made)
    with pytest.raises(RuntimeError, match=r"log_probs must have shape \(2,\) but has \(3,\)"):
        step(*example.arguments(), made[0], torch.empty(3), made[2])
    with pytest.raises(RuntimeError, match="model_output must have 2 rows but has 4"):
        step(*example.arguments()[:-1], None, *made)
    with pytest.raises(RuntimeError, match="latents must have dtype Float"):
        step(example.model_output, example.latents.double(), *example.arguments()[2:], *made)
    example.timesteps = torch.tensor([1, 1000])
    with pytest.raises(RuntimeError, match="timestep 1000 is not a row of the table"):
        step(*example.arguments(), *made)
