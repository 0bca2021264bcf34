"""Which backend an op runs, why another one cannot, and the cache of compiled C++ libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from file_damage import cut, flip_a_bit
from run_process import PYTHONPATH, ROOT, finish
from step_example import step_example
from torch.utils._python_dispatch import TorchDispatchMode

from ddpo_fast import ops
from ddpo_fast.ops import backend, extension


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python with none of this process's environment variables, so without TRITON_INTERPRET."""
    paths = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONPATH": PYTHONPATH}
    return finish([sys.executable, "-c", code], env=paths | environment, cwd=ROOT)


def test_every_backend_runs_on_this_machine_when_it_is_forced():
    """Otherwise the tests of a backend would pass by running another one."""
    for op in backend.OPS.values():
        for name, implementation in op.implementations.items():
            if implementation is not None:
                assert op.reasons(name, "cpu", torch.float32, forced=True) == ""


def test_every_op_has_a_reference_and_reasons_for_missing_backends():
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


def test_interpreted_kernels_and_fp64_kernels_are_not_chosen_automatically():
    op = backend.OPS["step_logprob"]
    assert op.backend("cpu", torch.float32) == "csrc"
    assert op.backend("cpu", torch.float64) == "reference"
    assert "TRITON_INTERPRET" in op.reasons("triton", "cpu", torch.float32)


def test_a_backend_that_cannot_run_is_refused_with_its_reason():
    with ops.force_backend("csrc"), pytest.raises(RuntimeError, match="float64 is computed by the reference only"):
        backend.OPS["step_logprob"].backend("cpu", torch.float64)


def test_an_op_without_the_chosen_backend_takes_another():
    op = backend.OPS["add_layernorm"]
    with ops.force_backend("csrc"):
        assert op.backend("cpu", torch.float32) == "reference"


def test_on_a_gpu_csrc_runs_what_is_written_in_cuda(monkeypatch):
    monkeypatch.setattr(backend, "triton_reasons", lambda device_type, forced=False: "")
    missing = {"cuda": "nvcc was not found"}
    monkeypatch.setattr(extension, "reasons", lambda device_type: missing.get(device_type, ""))
    norm, gate = backend.OPS["groupnorm_silu"], backend.OPS["geglu"]
    with ops.force_backend("auto"):
        with pytest.raises(ValueError, match="kernel_backend is 'csrc', which cannot run: nvcc was not found"):
            backend.require_backend("csrc", "cuda")
        with pytest.raises(ValueError, match=r"which cannot run: .* has C\+\+ for"):
            backend.require_backend("csrc", "mps")
        missing.clear()
        backend.require_backend("csrc", "cuda")
        assert [op.backend("cuda", torch.float16) for op in (norm, gate)] == ["csrc", "triton"]
    assert norm.backend("cuda", torch.float16) == "triton"


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        ops.use_backend("cuda")
    monkeypatch.setenv(backend.VARIABLE, "fast")
    with pytest.raises(ValueError, match="DDPO_FAST_BACKEND is 'fast'"):
        ops.step_logprob(*step_example().arguments())


INFO = "from ddpo_fast.cli import main; main(['info'])"


def test_info_without_a_compiler(tmp_path):
    """The command succeeds, and prints why each missing backend is missing."""
    done = in_process(INFO, PATH="/nonexistent", DDPO_FAST_CACHE=str(tmp_path))
    assert "no C++ compiler was found" in done.stdout
    assert "Triton has no compiler for cpu" in done.stdout
    assert "step_logprob" in done.stdout
    assert "ppo_loss" in done.stdout


def test_info_with_a_compiler_that_fails(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'no such thing as a compiler' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = in_process(INFO, PATH=f"{tmp_path}:/usr/bin:/bin", DDPO_FAST_CACHE=str(tmp_path / "cache"))
    assert "no such thing as a compiler" in done.stdout


def test_a_library_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPO_FAST_CACHE", str(tmp_path))
    first = extension.build("cpu")
    made = first.stat().st_mtime_ns
    assert extension.build("cpu") == first
    assert first.stat().st_mtime_ns == made
    assert [p.name for p in tmp_path.iterdir()] == [first.name], "nothing is left of the compilation"


@pytest.fixture
def compilations(monkeypatch) -> list[str]:
    """Replaces the compiler by a function that writes a file of other bytes each time; the paths that it wrote."""
    made: list[str] = []

    def run(commands):
        for command in commands:
            made.append(command[command.index("-o") + 1])
            Path(made[-1]).write_text(f"{len(made)}" * 5000)

    monkeypatch.setattr(extension, "_run", run)
    return made


@pytest.fixture
def cached(tmp_path, monkeypatch, compilations) -> Path:
    """A compiled library in an empty cache."""
    monkeypatch.setenv("DDPO_FAST_CACHE", str(tmp_path / "cache"))
    return extension.build("cpu")


def test_another_compiler_makes_another_library(cached, compilations, monkeypatch):
    before = len(compilations)
    monkeypatch.setenv("CXX", "g++ -DOTHER")
    assert extension.build("cpu") != cached
    assert len(compilations) == 2 * before


def append(library: Path) -> None:
    library.write_bytes(library.read_bytes() + b"more")


def link_elsewhere(library: Path) -> None:
    library.symlink_to(library.rename(library.parent.parent / "elsewhere.so"))


def link_to_nothing(library: Path) -> None:
    library.unlink()
    library.symlink_to("nothing.so")


def open_to_others(library: Path) -> None:
    library.chmod(0o777)


@pytest.mark.parametrize(
    "damage", [cut(1, 4096), cut(0), flip_a_bit, append, link_elsewhere, link_to_nothing, open_to_others, Path.unlink]
)
def test_a_library_that_was_changed_is_compiled_again(cached, compilations, damage):
    before = len(compilations)
    assert extension.build("cpu") == cached
    assert len(compilations) == before
    damage(cached)
    assert not extension.is_whole(cached)
    assert extension.build("cpu") == cached
    assert len(compilations) == 2 * before
    assert extension.is_whole(cached)
    assert not cached.is_symlink()


def test_only_the_owner_has_access_to_the_cache(cached):
    cached.parent.chmod(0o755)
    extension.build("cpu")
    assert cached.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702], ids=oct)
def test_a_cache_that_others_can_write_to_is_not_used(cached, mode):
    cached.parent.chmod(mode)
    with pytest.raises(OSError, match=rf"others can write to the cache folder {cached.parent} .*DDPO_FAST_CACHE"):
        extension.build("cpu")


def test_a_cache_of_another_user_is_not_used(cached, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: cached.stat().st_uid + 1)
    assert not extension.is_whole(cached)
    with pytest.raises(OSError, match="belongs to another user, whose libraries would run as you: set DDPO_FAST_CACHE"):
        extension.build("cpu")


def test_without_a_private_cache_other_backends_run(tmp_path):
    """A library that somebody else has put into the cache folder is not loaded, and the reason is printed."""
    tmp_path.chmod(0o777)
    code = "from ddpo_fast import ops; print(*ops.status('cpu'))"
    done = in_process(code, DDPO_FAST_CACHE=str(tmp_path))
    assert f"others can write to the cache folder {tmp_path} (mode 777)" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_processes_that_compile_at_once_leave_one_whole_library(cached, monkeypatch):
    """Each process compiles to a temporary file and renames it, so a file under the final name is complete."""
    others, run = iter(["while the first one compiles", "while that one does"]), extension._run

    def interrupted(commands):
        run(commands)
        if next(others, None):
            assert extension.is_whole(extension.build("cpu"))

    cached.unlink()
    monkeypatch.setattr(extension, "_run", interrupted)
    assert extension.is_whole(extension.build("cpu"))
    assert next(others, None) is None
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]


def test_cpp_checks_its_arguments():
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


def test_cpp_checks_the_layouts_of_its_arguments():
    assert extension.reasons("cpu") == ""
    cpp = torch.ops.ddpo_fast_csrc
    x, vector, statistic = torch.randn(2, 8, 3, 5), torch.ones(8), torch.empty(2, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    cpp.groupnorm_silu(last, vector, vector, 1e-5, True, None, torch.empty_like(last), statistic, statistic.clone())
    with pytest.raises(RuntimeError, match="y must have the shape, dtype and layout of x"):
        cpp.groupnorm_silu(last, vector, vector, 1e-5, True, None, torch.empty_like(x), statistic, statistic.clone())
    with pytest.raises(RuntimeError, match="x must be contiguous or channels_last"):
        cpp.groupnorm_silu(x.transpose(2, 3), vector, vector, 1e-5, True, None, x, statistic, statistic.clone())
    y, addend = torch.empty_like(x), torch.ones(3, 8)
    with pytest.raises(RuntimeError, match=r"addend must have shape \(2,8,\) but has \(3,8,\)"):
        cpp.groupnorm_silu(x, vector, vector, 1e-5, True, addend, y, statistic, statistic.clone())
    with pytest.raises(RuntimeError, match="y must be contiguous, half as large as x and of its dtype"):
        cpp.geglu(x[..., :4].contiguous(), None, y)
    with pytest.raises(RuntimeError, match="x must have an even number of columns but has 5"):
        cpp.geglu(x, None, y)


def test_a_direct_call_gives_the_registered_op_s_bits_and_gradients():
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(4, 8)
    low, high = torch.randn(2, 8, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    op = backend.OPS["lora_linear"]
    arguments = (x, weight, None, low, high, 0.5)
    outputs = [call(*arguments)[0] for call in (op, op._torch_op)]
    assert "lora_linear" in type(outputs[0].grad_fn).__name__
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(output.square().sum(), (x, low, high)) for output in outputs]
    assert all(map(torch.equal, *gradients))


def test_a_direct_call_refuses_a_second_differentiation():
    x = torch.randn(2, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.geglu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_traces_sees_the_op_and_not_what_it_runs():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    names = []
    with Seen():
        ops.geglu(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert {"ddpo_fast::geglu", "ddpo_fast::geglu_backward"} <= set(names)
    assert not any("gelu" in name and "geglu" not in name for name in names)
