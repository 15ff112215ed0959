"""Memory: work that may run out of it, and the peak that a piece of work takes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ..errors import is_out_of_memory

T = TypeVar("T")

PROCESS = Path("/proc/self")
RESET_PEAK = "5"
"""Text that is written to `clear_refs` to set a Linux process's peak back to what it takes now."""


@dataclass
class Peak:
    """The most bytes in use above those at the start; None during the work, and where it cannot be measured."""

    bytes: int | None = None


def devices(model: nn.Module) -> set[torch.device]:
    """Return the devices that hold a model's weights."""
    return {parameter.device for parameter in model.parameters()}


@contextmanager
def watch(on: Collection[torch.device]) -> Iterator[Peak]:
    """Measure the most memory taken within this block, above what is taken before it.

    On CUDA it is what torch has allocated, added up over devices. On a Linux CPU it is what the process has in
    memory, so that other threads count as well; elsewhere it is not measured.
    """
    _trim(on)
    peak, before = Peak(), _start(on)
    try:
        yield peak
    finally:
        if before is not None:
            peak.bytes = max(0, _highest(on) - before)


def attempt(work: Callable[[], T], on: Collection[torch.device]) -> T | None:
    """Return the result of some work; None if it ran out of memory, all of which is then given back."""
    try:
        return work()
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
    tidy(on)
    return None


def tidy(on: Collection[torch.device]) -> None:
    """Give back all memory that is not in use."""
    gc.collect()
    _trim(on)
    if _on_cuda(on):
        torch.cuda.empty_cache()


def synchronize(on: Collection[torch.device]) -> None:
    """Wait until all work that was given to a GPU is done."""
    for device in on:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()


def free_memory(on: Collection[torch.device]) -> int | None:
    """Return the bytes that are free on these devices together; None where that is not known."""
    if _on_cuda(on):
        return sum(torch.cuda.mem_get_info(device)[0] for device in on)
    return _kib(Path("/proc/meminfo"), "MemAvailable")


def _trim(on: Collection[torch.device]) -> None:
    """Give back the C library's reserve, which would hide what is taken next; torch's own on CUDA does not."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if PROCESS.exists() and not _on_cuda(on) else None
    if trim is not None:
        trim(0)


def _start(on: Collection[torch.device]) -> int | None:
    """Set the peak back and return the bytes in use now; None if they cannot be measured."""
    if _on_cuda(on):
        for device in on:
            torch.cuda.reset_peak_memory_stats(device)
        return sum(torch.cuda.memory_allocated(device) for device in on)
    if any(device.type != "cpu" for device in on):
        return None
    try:
        (PROCESS / "clear_refs").write_text(RESET_PEAK)
    except OSError:
        return None
    return _kib(PROCESS / "status", "VmRSS")


def _highest(on: Collection[torch.device]) -> int:
    if _on_cuda(on):
        return sum(torch.cuda.max_memory_allocated(device) for device in on)
    return _kib(PROCESS / "status", "VmHWM") or 0


def _on_cuda(on: Collection[torch.device]) -> bool:
    return all(device.type == "cuda" for device in on)


def _kib(path: Path, key: str) -> int | None:
    """Return the bytes of a line `key: N kB` in a file of the system."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return next((1024 * int(number) for number in found), None)
