"""Timing on a GPU: medians of CUDA events, each candidate with a cold L2 cache, and what a plain copy reaches.

With `--dry-run` a script runs small, without a GPU and in Triton's interpreter: it shows that all of it works, times
nothing and saves nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import results
import torch
from kvmix_kernels.runtime import gpu as kernels

DRY = "--dry-run" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
if DRY:  # which Triton looks at when it is imported
    os.environ.update(TRITON_INTERPRET="1", KVMIX_TRITON="1", KVMIX_NATIVE="0")
L2_FLUSH_BYTES = 256 * 2**20
COPY_BYTES = 4 * 2**30


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the arguments, with those of every script on a GPU; stop, in one line, where there is no CUDA device."""
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="folder to write results.csv to")
    parser.add_argument("--dry-run", action="store_true", help="small, on a CPU, timing nothing")
    options = parser.parse_args()
    if DRY:
        kernels.is_usable = lambda device: True  # type: ignore[assignment]
        print("a dry run: no figure means anything")
    elif not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    return options


def name() -> str:
    """Return the name of the GPU."""
    return "no GPU" if DRY else torch.cuda.get_device_name()


def save(rows: list[dict[str, object]], folder: Path | None) -> None:
    """Append rows to the folder's results.csv, with GPU and versions; without a folder, nothing."""
    if folder is None or DRY:
        return
    import triton

    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "machine": name(),
        "isa": "sm_{}{}".format(*torch.cuda.get_device_capability()),
        "threads": "",
        "torch": f"{torch.__version__}, triton {triton.__version__}",
    }
    results.append([{**about, **row} for row in rows], folder / "results.csv")


def in_turns(candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, float]:
    """Return median milliseconds of each candidate. Each round runs all of them once, after emptying the L2 cache."""
    if DRY:
        for run in candidates.values():
            run()
        return dict.fromkeys(candidates, 1.0)
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
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
    """Capture work as a CUDA graph, so that launches from Python are not measured."""
    if DRY:
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth() -> float:
    """Return GB/s, read and written, of a device-to-device copy."""
    size = 1024 if DRY else min(COPY_BYTES, total_memory() // 8)
    source = torch.empty(size, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    ms = in_turns({"copy": lambda: target.copy_(source)}, rounds=10)["copy"]
    return 2 * size / ms / 1e6


def total_memory() -> int:
    """Return the bytes of the GPU's memory."""
    return 2**40 if DRY else torch.cuda.get_device_properties(0).total_memory


def synchronize() -> None:
    """Wait for the GPU."""
    if not DRY:
        torch.cuda.synchronize()


def forget() -> None:
    """Give back what nobody holds any more, and count the peak of memory from here."""
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Return the most bytes that were allocated since `forget`."""
    return 0 if DRY else torch.cuda.max_memory_allocated()
