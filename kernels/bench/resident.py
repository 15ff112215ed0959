"""Resident memory of this process, read without torch or kvmix, so that vllm_worker.py can read it as peers.py does."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_nbytes() -> int:
    """Return the most bytes that this process has had in memory so far (Linux).

    `ru_maxrss` would not do: Linux begins that of a new process at what the process that started it has.
    """
    return 1024 * next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
