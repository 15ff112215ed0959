"""Compilation of the native library.

The sources are plain C++ without torch's headers: a few seconds to compile, no tie to a torch version. A library is of
one instruction set, the one that this processor has (`processor.py`). Another machine that shares the folder has a
library of its own there, so none is stopped by an illegal instruction.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .processor import INSTRUCTION_SETS

PACKAGE = Path(__file__).parents[2]
SOURCES = {
    "attend/cpu.cpp": ("-ffp-contract=fast",),
    "attend/choice.cpp": ("-ffp-contract=fast",),
    "attend/vectors.cpp": ("-ffp-contract=fast",),
    "blocks/cpu.cpp": ("-ffp-contract=off",),
    "quantize/cpu.cpp": ("-ffp-contract=off",),
    "transform/cpu.cpp": ("-ffp-contract=off",),
}
"""Sources and their own flags: attention wants multiply-adds, the codecs must round where `naive` rounds."""
EXPORTS = "runtime/native/native.cpp"
HEADERS = (
    "runtime/native/simd.h",
    "attend/cpu.h",
    "attend/choice.h",
    "attend/plain.h",
    "attend/contract.h",
    "attend/codes.h",
    "attend/planes.h",
    "attend/coded.h",
    "attend/key_products.h",
    "attend/coded_keys.h",
    "attend/coded_values.h",
    "attend/vectors.h",
    "blocks/cpu.h",
    "quantize/cpu.h",
    "quantize/grids.h",
    "transform/cpu.h",
)

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi")


class BuildError(Exception):
    """A library that could not be compiled or written; the message says why, in one line."""


def build_key(isa: str) -> str:
    """Return a name for what these sources, flags and compiler make for an instruction set."""
    digest = hashlib.sha256()
    for name in (*SOURCES, EXPORTS, *HEADERS):
        digest.update((PACKAGE / name).read_bytes())
    settings = (*FLAGS, *_extra_flags(), str(SOURCES), isa, *INSTRUCTION_SETS[isa], compiler() or "", sys.platform)
    digest.update(" ".join(settings).encode())
    return digest.hexdigest()[:16]


def compiler() -> str | None:
    """Return `CXX`, or the first C++ compiler on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def compile_library(folder: Path, isa: str) -> Path:
    """Compile the library for an instruction set into a folder, all sources at the same time, and return its path.

    Raises:
        BuildError: if there is no compiler, or it fails.
    """
    command = compiler()
    if command is None:
        raise BuildError("no C++ compiler found (install g++, or set CXX)")
    library, jobs = folder / "library.so", {}
    try:
        for target, arguments in _units(folder, isa).items():
            jobs[target] = _start(command, *FLAGS, *_extra_flags(), *arguments, "-c", "-o", str(target))
        for job in jobs.values():
            _finish(command, job)
        link = _start(command, "-shared", "-fopenmp", *_extra_flags(), *map(str, jobs), "-o", str(library))
        _finish(command, link)
    finally:
        for job in jobs.values():
            if job.stderr is not None and not job.stderr.closed:  # another one has failed, or the user interrupts
                job.kill()
                job.communicate()
    return library


def _units(folder: Path, isa: str) -> dict[Path, tuple[str, ...]]:
    """Return object files, and the arguments of the compiler for each: a source and its flags."""
    sources = {**SOURCES, EXPORTS: ()}
    flags = (f"-DKVMIX_ISA={isa}", *INSTRUCTION_SETS[isa])
    return {
        folder / f"{source.replace('/', '-')}.o": (*flags, *own, str(PACKAGE / source))
        for source, own in sources.items()
    }


def _extra_flags() -> tuple[str, ...]:
    """Return `KVMIX_CXXFLAGS`, for instance `-fsanitize=address -g`."""
    return tuple(os.environ.get("KVMIX_CXXFLAGS", "").split())


def _start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(command: str, job: subprocess.Popen[str]) -> None:
    _, complaint = job.communicate()
    if job.returncode:
        lines = [line for line in complaint.splitlines() if "error" in line] or complaint.splitlines() or ["no message"]
        raise BuildError(f"{Path(command).name} failed: {lines[0]}")
