"""Timing on a GPU: medians of CUDA events, each candidate with a cold L2 cache, and what a plain copy reaches."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import results
import torch

L2_FLUSH_BYTES = 256 * 2**20
COPY_BYTES = 4 * 2**30


def require_gpu() -> None:
    """Stop, in one line, where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")


def save(rows: list[dict[str, object]], folder: Path | None) -> None:
    """Append rows to the folder's results.csv, with GPU and versions; without a folder, nothing."""
    if folder is None:
        return
    import triton

    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "machine": torch.cuda.get_device_name(),
        "isa": "sm_{}{}".format(*torch.cuda.get_device_capability()),
        "threads": "",
        "torch": f"{torch.__version__}, triton {triton.__version__}",
    }
    results.append([{**about, **row} for row in rows], folder / "results.csv")


def in_turns(candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, float]:
    """Median milliseconds of each candidate. Each round runs all of them once, after emptying the L2 cache."""
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in candidates}
    for number in range(warmup + rounds):
        for name, run in candidates.items():
            flush.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            if number >= warmup:
                events[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in each) for name, each in events.items()}


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The same work as a CUDA graph, so that launches from Python are not what is measured."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth() -> float:
    """GB/s, read and written, of a device-to-device copy."""
    size = min(COPY_BYTES, torch.cuda.get_device_properties(0).total_memory // 8)
    source = torch.empty(size, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    ms = in_turns({"copy": lambda: target.copy_(source)}, rounds=10)["copy"]
    return 2 * size / ms / 1e6
