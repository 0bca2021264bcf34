"""`csrc/`: compiled at first use into a cache, loaded once; a failure is kept as the reason."""

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

# beside the package in a checkout, inside it when installed from a wheel
_PLACES = (Path(__file__).parents[2] / "csrc", Path(__file__).parents[1] / "csrc")
CSRC = next((place for place in _PLACES if (place / "common.h").exists()), _PLACES[0])
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11: one binary for it and every later one
CPU_COMMON = ("-std=c++20", "-fPIC", STABLE_ABI)
CPU_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
CUDA_COMMON = ("-std=c++20", STABLE_ABI, "-O3", "-DUSE_CUDA", "--fmad=false", "-Xcompiler", "-fPIC")
COMPILE_SECONDS = 300
OTHERS_WRITE = 0o022
# hexadecimal SHA-256
DIGEST_BYTES = 64


def cache_folder() -> Path:
    """Where compiled extensions are kept: `DDPO_FAST_CACHE`, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DDPO_FAST_CACHE") or Path(base) / "ddpo_fast").expanduser()


def private_cache() -> Path:
    """The cache folder, made if it is not there, closed to everybody else: what it holds is executed.

    Raises `OSError` if it is another user's or if others could have put something into it.
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
    """Why the compiled ops do not run on a device, or '': compiles and loads them if that has not been done."""
    if device_type not in ("cpu", "cuda"):
        return f"there is no C++ for {device_type}"
    # the schemas are the CPU library's
    if device_type == "cuda" and (missing := reasons("cpu")):
        return missing
    try:
        torch.ops.load_library(str(build(device_type)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())[:400]
    return ""


def build(device_type: str) -> Path:
    """The library for a device, compiled unless the cache has it whole.

    Its name holds a hash of the sources, the compiler, the flags, torch's version and the processor, and the file ends
    with the digest of the rest, which a loader does not read. Processes that compile at the same time each finish their
    own copy, and the last one stays. Raises `OSError` without a compiler or a private cache, `RuntimeError` if it
    fails.
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
    """Whether it is a file of this user, not a link, that is as `build` left it: a cut library kills its process."""
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
    """Runs compilers side by side. Raises `RuntimeError` with what the first that fails says."""
    running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
    done = [(process, process.communicate(timeout=COMPILE_SECONDS)[1]) for process in running]
    for process, said in done:
        if process.returncode != 0:
            raise RuntimeError(f"{commands[0][0]} failed: {said.strip()[:300]}")


def include_flags(include: Path | None = None) -> list[str]:
    """What the compilers need to find: our headers and torch's, the installed one's or those in another folder."""
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
    digest = hashlib.sha256()
    for path in sorted(CSRC.glob("*")):
        digest.update(path.name.encode() + path.read_bytes())
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=60).stdout
    processor = f"{platform.machine()} {_processor_flags()}"
    for part in (*command, version, processor, torch.__version__, device_type):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _processor_flags() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
