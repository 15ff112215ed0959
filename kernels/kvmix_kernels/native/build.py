"""Compile the native library, once, into a cache folder.

The sources are plain C++ without torch's headers: a few seconds to compile, no tie to a torch version. Each source is
compiled for every instruction set, and `native.cpp` chooses by CPUID at run time, so a library built on one machine
never stops another with an illegal instruction.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SOURCES = {
    "attend/cpu.cpp": ("-ffp-contract=fast",),
    "quantize/cpu.cpp": ("-ffp-contract=off",),
}
"""And their own flags: attention wants multiply-adds, the codec must round where the naive reference rounds."""
DISPATCH = "native/native.cpp"
HEADERS = ("native/simd.h", "attend/cpu.h", "attend/contract.h", "quantize/cpu.h")

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi")
_AVX512 = ("-DKVMIX_WIDTH=16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
VARIANTS = {
    "generic": ("-DKVMIX_WIDTH=4",),
    "avx2": ("-DKVMIX_WIDTH=8", "-mavx2", "-mfma"),
    "avx512": _AVX512,
    "vnni": (*_AVX512, "-mavx512vnni"),
}
"""Instruction sets, least first; `native.cpp` chooses among them. Only x86 has more than the first."""


class BuildError(Exception):
    """The library could not be compiled; the message says why, in one line."""


def library_path() -> Path:
    """Where the library for these sources, flags and compiler is, or will be."""
    digest = hashlib.sha256()
    for name in (*SOURCES, DISPATCH, *HEADERS):
        digest.update((PACKAGE / name).read_bytes())
    digest.update(
        " ".join((*FLAGS, *extra_flags(), str(SOURCES), str(_variants()), compiler() or "", sys.platform)).encode()
    )
    return cache_dir() / f"kvmix-{digest.hexdigest()[:16]}.so"


def cache_dir() -> Path:
    """`KVMIX_CACHE_DIR`, or `kvmix` in the user's cache folder."""
    given = os.environ.get("KVMIX_CACHE_DIR")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmix"


def compiler() -> str | None:
    """`CXX`, or the first C++ compiler on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def extra_flags() -> tuple[str, ...]:
    """`KVMIX_CXXFLAGS`, for instance `-fsanitize=address -g`."""
    return tuple(os.environ.get("KVMIX_CXXFLAGS", "").split())


def build() -> Path:
    """Compile the library if it is not there; safe when several processes do so at once.

    Raises:
        BuildError: if there is no compiler, it fails, or the folder cannot be written.
    """
    target = library_path()
    if target.is_file():
        return target
    if compiler() is None:
        raise BuildError("no C++ compiler found (install g++, or set CXX)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            library = _compile(Path(folder))
            library.replace(target)  # atomic: another process sees all of it or nothing
    except OSError as error:
        raise BuildError(f"{target.parent} cannot be written ({error.strerror}); set KVMIX_CACHE_DIR") from error
    return target


def _variants() -> dict[str, tuple[str, ...]]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return VARIANTS if x86 else {"generic": VARIANTS["generic"]}


def _compile(folder: Path) -> Path:
    jobs: list[tuple[Path, subprocess.Popen[str]]] = []
    for name, flags in _variants().items():
        for source, own in SOURCES.items():
            target = folder / f"{name}-{source.replace('/', '-')}.o"
            jobs.append((target, _start(source, target, f"-DKVMIX_ISA={name}", *flags, *own)))
    names = [f"-DKVMIX_HAS_{name.upper()}" for name in _variants()]
    jobs.append((folder / "native.o", _start(DISPATCH, folder / "native.o", *names)))
    for _, job in jobs:
        _finish(job)
    library = folder / "library.so"
    _finish(_run("-shared", "-fopenmp", *extra_flags(), *(str(target) for target, _ in jobs), "-o", str(library)))
    return library


def _start(source: str, target: Path, *flags: str) -> subprocess.Popen[str]:
    return _run(*FLAGS, *extra_flags(), *flags, "-c", str(PACKAGE / source), "-o", str(target))


def _run(*arguments: str) -> subprocess.Popen[str]:
    command = [compiler() or "c++", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(job: subprocess.Popen[str]) -> None:
    _, complaint = job.communicate()
    if job.returncode:
        lines = [line for line in complaint.splitlines() if "error" in line] or complaint.splitlines() or ["no message"]
        raise BuildError(f"{Path(str(job.args[0])).name} failed: {lines[0]}")  # type: ignore[index]
