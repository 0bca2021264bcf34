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


@pytest.fixture
def compilations(monkeypatch) -> list[str]:
    """The outputs of compilers that write each time something else, and nothing of a library."""
    made: list[str] = []

    def run(commands):
        for command in commands:
            made.append(command[command.index("-o") + 1])
            Path(made[-1]).write_text(f"{len(made)}" * 5000)

    monkeypatch.setattr(extension, "_run", run)
    return made


@pytest.fixture
def cached(tmp_path, monkeypatch, compilations) -> Path:
    """A library in a cache of its own."""
    monkeypatch.setenv("DDPO_FAST_CACHE", str(tmp_path / "cache"))
    return extension.build("cpu")


def cut(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:-4096])


def empty(library: Path) -> None:
    library.write_bytes(b"")


def change_a_byte(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


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
    "damage", [cut, empty, change_a_byte, append, link_elsewhere, link_to_nothing, open_to_others, Path.unlink]
)
def test_only_a_library_that_is_as_it_was_made_is_loaded(cached, compilations, damage):
    before = len(compilations)
    assert extension.build("cpu") == cached
    assert len(compilations) == before
    damage(cached)
    assert not extension.is_whole(cached)
    assert extension.build("cpu") == cached
    assert len(compilations) == 2 * before
    assert extension.is_whole(cached)
    assert not cached.is_symlink()


def test_the_cache_is_closed_to_others(cached):
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


def test_without_a_private_cache_everything_works_and_says_why(tmp_path):
    """And a planted library is not loaded: this one would raise."""
    tmp_path.chmod(0o777)
    code = "from ddpo_fast import ops; print(*ops.status('cpu'))"
    done = in_process(code, DDPO_FAST_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"others can write to the cache folder {tmp_path} (mode 777)" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_processes_that_compile_at_once_leave_one_whole_library(cached, monkeypatch):
    """Each writes aside and renames: whatever the order, a file that is found is whole."""
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
