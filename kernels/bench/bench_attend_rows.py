"""The native CPU path against matrix products on dequantized tiles, by the number of query rows of a KV head.

    python kernels/bench/bench_attend_rows.py [--context 8192] [--rounds 5] [--save]

Where the native path were slower, `kvmix_kernels.attend` would have to choose. Shape and pages as in
bench_attend_cpu.py; `ratio` is naive over native time for the same chunk.
"""

from __future__ import annotations

import argparse

import results
import torch
from bench_attend_cpu import HEAD_DIM, KV_HEADS, RATIO, pack
from kvmix_kernels.attend import AttentionProblem, cpu, naive
from kvmix_kernels.runtime.native import library


def measure(context: int, queries: int, bits: int, rounds: int) -> list[dict[str, object]]:
    """Return one row a path, for a chunk of `queries` tokens."""
    native = library()
    if native is None:
        raise SystemExit("there is no native library to measure")
    query = torch.randn(1, KV_HEADS * RATIO, queries, HEAD_DIM)
    states = [torch.randn(1, KV_HEADS, context, HEAD_DIM) for _ in range(2)]
    key, value = pack("key", bits, states[0]), pack("value", bits, states[1])
    problem = AttentionProblem(query, key, value, scaling=HEAD_DIM**-0.5)
    paths = {"naive": lambda: naive.attend(problem), "native": lambda: cpu.attend(native, problem)}
    times = results.in_turns(paths, rounds, warmup=1)
    rows, ratio = queries * RATIO, times["naive"] / times["native"]
    print(
        f"  {bits} bits, {rows:4} rows: naive {times['naive']:8.1f} ms, native {times['native']:8.1f} ms, {ratio:.2f}x"
    )
    shape = f"{KV_HEADS}x{rows}x{HEAD_DIM}"
    row = {"op": "attend-rows", "shape": shape, "context": context}
    return [
        {**row, "name": f"{name} {bits}", "ms": round(ms, 2), "ratio": round(times["naive"] / ms, 2)}
        for name, ms in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    chunks = [(queries, bits) for bits in (2, 4, 16) for queries in (1, 4, 16, 32, 64, 128)]
    rows = [row for queries, bits in chunks for row in measure(options.context, queries, bits, options.rounds)]
    if options.save:
        results.append(rows)


if __name__ == "__main__":
    main()
