"""Quantizing and packing a long prompt on a CPU: the native path against the PyTorch reference, same words and scales.

    python kernels/bench/bench_quantize_cpu.py [--context 16384] [--rounds 3] [--save]

One layer of Llama-3-8B's shape: 8 KV heads, head_dim 128, pages of 128, groups of 64. `ratio` is the reference's time
over the native one's. A result that differs in one bit is refused.
"""

from __future__ import annotations

import argparse
from typing import Literal

import results
import torch
from bench_attend_cpu import GROUP, HEAD_DIM, KV_HEADS, PAGE
from kvmix_kernels import PageLayout
from kvmix_kernels.quantize import cpu, naive
from kvmix_kernels.runtime.native import library


def measure(kind: Literal["key", "value"], bits: int, context: int, rounds: int) -> list[dict[str, object]]:
    """Return one row a path."""
    native = library()
    if native is None:
        raise SystemExit("there is no native library to measure")
    layout = PageLayout(kind, bits, HEAD_DIM, PAGE, GROUP)
    pages = torch.randn(1, KV_HEADS, context // PAGE, PAGE, HEAD_DIM)
    for one, other in zip(cpu.quantize(native, pages, layout), naive.quantize(pages, layout), strict=True):
        if not torch.equal(one, other):
            raise SystemExit(f"the native {kind} codes or scales differ at {bits} bits; nothing is timed")
    paths = {"naive": lambda: naive.quantize(pages, layout), "native": lambda: cpu.quantize(native, pages, layout)}
    times = results.in_turns(paths, rounds, warmup=1)
    ratio = times["naive"] / times["native"]
    print(f"  {kind:5} {bits} bits: naive {times['naive']:7.1f} ms, native {times['native']:6.1f} ms, {ratio:.1f}x")
    row = {"op": "quantize", "shape": f"{KV_HEADS}x{HEAD_DIM} {kind}", "context": context}
    speed = {name: round(pages.nbytes / ms / 1e6, 2) for name, ms in times.items()}
    return [
        {
            **row,
            "name": f"{name} {bits}",
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
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    kinds: tuple[Literal["key", "value"], ...] = ("key", "value")
    cases = [(kind, bits) for kind in kinds for bits in (2, 3, 4, 8)]
    rows = [row for kind, bits in cases for row in measure(kind, bits, options.context, options.rounds)]
    if options.save:
        results.append(rows)


if __name__ == "__main__":
    main()
