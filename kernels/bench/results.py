"""Measured figures: timing in turns, and rows of `results.csv` with the machine they were measured on."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from kvmix_kernels.runtime.native import instruction_set

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = ("date", "machine", "isa", "threads", "torch", "op", "shape", "context", "name", "ms", "gb_per_s", "ratio")


def in_turns(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return median milliseconds of each candidate. Each round runs all of them once, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warmup + rounds):
        for name, run in candidates.items():
            start = clock()
            run()
            if number >= warmup:
                times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(each) for name, each in times.items()}


def append(rows: list[dict[str, object]], path: Path = RESULTS) -> None:
    """Add rows to the file, with date, machine and versions."""
    about = {
        "date": date.today().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cpus",
        "isa": instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows({**about, **row} for row in rows)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
