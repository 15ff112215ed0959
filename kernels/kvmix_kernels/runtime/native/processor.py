"""Instruction sets that the native library can be compiled for, and those that this processor has."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path

_AVX512 = ("-DKVMIX_WIDTH=16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
INSTRUCTION_SETS = {
    "generic": ("-DKVMIX_WIDTH=4",),
    "avx2": ("-DKVMIX_WIDTH=8", "-mavx2", "-mfma"),
    "avx512": _AVX512,
    "vnni": (*_AVX512, "-mavx512vnni"),
}
"""Instruction sets, least first, and the compiler's flags for each. Only x86 has more than the first."""
_NEEDS = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"},
    "vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "avx512_vnni"},
}
"""Features of a processor, as Linux names them, that an instruction set needs."""
_CPUINFO = Path("/proc/cpuinfo")
"""Features that processor and system have; where there is no such file, the generic code runs."""


@functools.cache
def available() -> tuple[str, ...]:
    """Return the instruction sets of this processor, least first."""
    features: set[str] = set()
    if platform.machine().lower() in ("x86_64", "amd64"):
        try:
            found = re.search(r"^flags\s*:(.*)$", _CPUINFO.read_text(), re.MULTILINE)
        except OSError:
            found = None
        features = set(found[1].split()) if found else set()
    return tuple(name for name in INSTRUCTION_SETS if _NEEDS.get(name, set()) <= features)


def wanted() -> str:
    """Return the best instruction set of this processor, or the one that `KVMIX_ISA` asks for if it has that."""
    asked = os.environ.get("KVMIX_ISA", "")
    return asked if asked in available() else available()[-1]
