"""Compiles `csrc/` at its first use, keeps the library in a cache folder, and loads it.

The sources use only torch's stable ABI, so they compile in seconds and work with every torch from 2.11 on. A failure to
compile raises no error: it becomes the reason why the backend `csrc` does not run.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

# `csrc` lies beside the package in a checkout and inside it in a wheel
_PLACES = (Path(__file__).parents[2] / "csrc", Path(__file__).parents[1] / "csrc")
CSRC = next((place for place in _PLACES if (place / "common.h").exists()), _PLACES[0])
# torch 2.11: the headers then offer only what that version has, so the library runs with every later version too
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CPU_COMMON = ("-std=c++20", "-fPIC", STABLE_ABI)
# -ffp-contract=off keeps the compiler from fusing a product and a sum. It could fuse them in sampling and not in
# training, and the log-probs would differ in their last bits. The sources call fma explicitly.
CPU_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
CUDA_COMMON = ("-std=c++20", STABLE_ABI, "-O3", "-DUSE_CUDA", "-Xcompiler", "-fPIC")
COMPILE_SECONDS = 300
# the mode bits that allow the group or others to write
OTHERS_WRITE = 0o022
# the length of a SHA-256 in hexadecimal
DIGEST_BYTES = 64


def cache_folder() -> Path:
    """The folder of compiled libraries: `DDPO_FAST_CACHE`, else `ddpo_fast` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DDPO_FAST_CACHE") or Path(base) / "ddpo_fast").expanduser()


def private_cache() -> Path:
    """Returns the cache folder, made if it does not exist, with access for this user only.

    Libraries from this folder run with the user's rights, so nobody else may be able to write to it. Raises `OSError`
    if it belongs to another user, or if others can write to it.
    """
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise OSError(
            f"the cache folder {folder} belongs to another user, whose libraries would run as you: "
            "set DDPO_FAST_CACHE to a folder of your own"
        )
    if found.st_mode & OTHERS_WRITE:
        raise OSError(
            f"others can write to the cache folder {folder} (mode {found.st_mode & 0o777:o}), and their libraries "
            "would run as you: empty it and make it yours alone (chmod 700), or set DDPO_FAST_CACHE to one of your own"
        )
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


@functools.cache
def reasons(device_type: str) -> str:
    """Compiles and loads the ops of a device type if necessary; returns why they do not run there, or ''."""
    if device_type not in ("cpu", "cuda"):
        return f"there is no C++ for {device_type}"
    # the CPU's library defines the schemas, and CUDA's only adds implementations to them
    if device_type == "cuda" and (missing := reasons("cpu")):
        return missing
    try:
        torch.ops.load_library(str(build(device_type)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())[:400]
    return ""


def build(device_type: str) -> Path:
    """Returns the path of the library for a device type, and compiles it unless the cache holds it intact.

    The file's name contains a hash of everything that the library depends on: sources, compiler, flags, torch's version
    and the processor. The file ends with a digest of the bytes before the digest; the dynamic loader ignores bytes
    after an ELF file's sections. Processes that compile at the same time each write to a temporary folder and then
    rename the file. All of them make the same library, so it does not matter which one remains.

    Raises `OSError` if there is no compiler or no private cache folder, `RuntimeError` if compiling fails.
    """
    if not (CSRC / "common.h").exists():
        raise OSError(f"there are no sources in {CSRC}")
    command = _cuda_command() if device_type == "cuda" else _cpu_command()
    sources = sorted(CSRC.glob("*.cu" if device_type == "cuda" else "*.cpp"))
    library = private_cache() / f"ddpo_fast_{device_type}-{_key(command, device_type)}.so"
    if is_whole(library):
        return library
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        objects = [f"{work}/{source.stem}.o" for source in sources]
        _run([[*command, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)])
        made = Path(work) / library.name
        _run([[*command, *objects, "-shared", "-o", str(made), *_link_flags(device_type)]])
        with made.open("ab") as file:
            file.write(hashlib.sha256(made.read_bytes()).hexdigest().encode())
        made.chmod(0o700)
        made.replace(library)
    return library


def is_whole(library: Path) -> bool:
    """Whether a library file is this user's, is not a link, and has not changed since `build` wrote it.

    The digest is checked because loading a truncated library ends the process with a signal, without an exception.
    """
    try:
        with open(os.open(library, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            found = os.fstat(file.fileno())
            content = file.read()
    except OSError:
        return False
    private = found.st_uid == os.geteuid() and not found.st_mode & OTHERS_WRITE
    code, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    return private and hashlib.sha256(code).hexdigest().encode() == digest


def _run(commands: list[list[str]]) -> None:
    """Runs commands in parallel. Raises `RuntimeError` with the error output of the first that fails."""
    running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
    done = [(process, process.communicate(timeout=COMPILE_SECONDS)[1]) for process in running]
    for process, said in done:
        if process.returncode != 0:
            raise RuntimeError(f"{commands[0][0]} failed: {said.strip()[:300]}")


def include_flags(include: Path | None = None) -> list[str]:
    """The -I flags for the headers of `csrc/` and of torch: the installed torch's, or those in the folder `include`."""
    include = include or Path(torch.__file__).parent / "include"
    return [f"-I{CSRC}", f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]


def _cpu_command() -> list[str]:
    asked_for = shlex.split(os.environ.get("CXX", ""))
    compiler = asked_for or [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))][:1]
    if not compiler or shutil.which(compiler[0]) is None:
        raise OSError(f"no C++ compiler was found ({compiler[0] if compiler else 'c++, g++ or clang++'})")
    return [*compiler, *CPU_COMMON, *CPU_FLAGS, *include_flags()]


def _cuda_command() -> list[str]:
    compiler = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if compiler is None:
        raise OSError("nvcc was not found")
    if not torch.cuda.is_available():
        raise OSError("torch sees no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    return [compiler, f"-arch=sm_{major}{minor}", *CUDA_COMMON, *include_flags()]


def _link_flags(device_type: str) -> list[str]:
    folder = Path(torch.__file__).parent / "lib"
    libraries = ["-ltorch_cpu", "-lc10", *(["-ltorch_cuda"] if device_type == "cuda" else [])]
    return [f"-L{folder}", *libraries]


def _key(command: list[str], device_type: str) -> str:
    """A hash of everything that the compiled library depends on."""
    digest = hashlib.sha256()
    for path in sorted(CSRC.glob("*")):
        digest.update(path.name.encode() + path.read_bytes())
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=60).stdout
    processor = f"{platform.machine()} {_processor_flags()}"
    for part in (*command, version, processor, torch.__version__, device_type):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _processor_flags() -> str:
    """The processor's features, on which `-march=native` depends.

    They are part of the cache's key because a home folder may be shared by machines with different processors.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
