"""The most memory that a piece of work takes, and what to do when there is none left."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from .loading import LoadedModel

T = TypeVar("T")

PROCESS = Path("/proc/self")
RESET_PEAK = "5"
"""What is written to `clear_refs` to set a Linux process's peak back to what it takes now."""
SAID = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
"""What errors say that are about memory but of no class of their own."""


@dataclass
class Peak:
    """The most bytes above those at the start; None while the work goes on, and where it cannot be measured."""

    bytes: int | None = None


def devices(loaded: LoadedModel) -> set[torch.device]:
    """Where a model's weights are."""
    return {parameter.device for parameter in loaded.model.parameters()}


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
    """What the work returns; None if it ran out of memory, all of which is then given back."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    tidy(on)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory was left: of a GPU, or of the CPU's allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words.lower() in str(error).lower() for words in SAID)


def tidy(on: Collection[torch.device]) -> None:
    """Give back all memory that is not in use."""
    gc.collect()
    _trim(on)
    if _on_cuda(on):
        torch.cuda.empty_cache()


def synchronize(on: Collection[torch.device]) -> None:
    """Wait until a GPU has done what it was asked to."""
    for device in on:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()


def free_memory(on: Collection[torch.device]) -> int | None:
    """Bytes that can still be had on these devices, together; None where that is not known."""
    if _on_cuda(on):
        return sum(torch.cuda.mem_get_info(device)[0] for device in on)
    return _kib(Path("/proc/meminfo"), "MemAvailable")


def _trim(on: Collection[torch.device]) -> None:
    """Give the C library's reserve back, which would hide what is taken next. On CUDA torch's own does not hide it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if PROCESS.exists() and not _on_cuda(on) else None
    if trim is not None:
        trim(0)


def _start(on: Collection[torch.device]) -> int | None:
    """Set the peak back; what is in use now, None if it cannot be measured."""
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
    """A line `key: N kB` of a file of the system, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return next((1024 * int(number) for number in found), None)
