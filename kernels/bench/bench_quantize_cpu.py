"""Quantizing and packing a long prompt on a CPU: the native path against the PyTorch reference, same words and scales.

    python kernels/bench/bench_quantize_cpu.py [--context 16384] [--rounds 3] [--cpu-time] [--save]

One layer of Llama-3-8B's shape: 8 KV heads, head_dim 128, pages of 128, groups of 64. `ratio` is the time of the
reference with `minmax` over the path's. A result that differs in one bit is refused.
With `--cpu-time`, for a machine that is not idle, one thread is used and its own time counts.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Literal

import results
import torch
from bench_attend_cpu import GROUP, HEAD_DIM, KV_HEADS, PAGE
from kvmix_kernels import PageLayout
from kvmix_kernels.layout import ENCODERS
from kvmix_kernels.quantize import cpu, naive
from kvmix_kernels.runtime.native import library


def measure(
    kind: Literal["key", "value"], bits: int, context: int, rounds: int, clock: Callable[[], float]
) -> list[dict[str, object]]:
    """Return one row a path."""
    native = library()
    if native is None:
        raise SystemExit("there is no native library to measure")
    layout = PageLayout(kind, bits, HEAD_DIM, PAGE, GROUP)
    pages = torch.randn(1, KV_HEADS, context // PAGE, PAGE, HEAD_DIM)
    paths: dict[str, Callable[[], object]] = {"naive": lambda: naive.quantize(pages, layout)}
    for encoder in ENCODERS:
        some = pages[:, :, :4]
        made, expected = cpu.quantize(native, some, layout, encoder), naive.quantize(some, layout, encoder)
        if not all(torch.equal(one, other) for one, other in zip(made, expected, strict=True)):
            raise SystemExit(f"the native {kind} codes or scales of {encoder} differ at {bits} bits; nothing is timed")
        name = "native" if encoder == "minmax" else f"native {encoder}"
        paths[name] = functools.partial(cpu.quantize, native, pages, layout, encoder)
    times = results.in_turns(paths, rounds, warmup=1, clock=clock)
    print(f"  {kind:5} {bits} bits: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in times.items()))
    row = {"op": "quantize", "shape": f"{KV_HEADS}x{HEAD_DIM} {kind}", "context": context}
    speed = {name: round(pages.nbytes / ms / 1e6, 2) for name, ms in times.items()}
    return [
        {
            **row,
            "name": " ".join([*name.split()[:1], f"{bits}", *name.split()[1:]]),
            "ms": round(ms, 2),
            "gb_per_s": speed[name],
            "ratio": round(times["naive"] / ms, 2),
        }
        for name, ms in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if options.cpu_time else time.perf_counter
    kinds: tuple[Literal["key", "value"], ...] = ("key", "value")
    cases = [(kind, bits) for kind in kinds for bits in (2, 3, 4, 8)]
    rows = [row for kind, bits in cases for row in measure(kind, bits, options.context, options.rounds, clock)]
    if options.save:
        results.append(rows)


if __name__ == "__main__":
    main()
