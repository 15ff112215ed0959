"""Decode attention over vector codes on a CPU: tables of products against decoding in PyTorch, affine codes and torch.

    python kernels/bench/bench_vectors_cpu.py [--contexts 16384] [--head-dims 128,64] [--rounds 9] [--save]

Heads of Llama-3-8B, and as many of 64 channels: 8 KV heads, 4 query heads each, one query, pages of 128, one thread
and its own time. `vectors` are the codes of the normal distribution's codebook with a scale a token, `decoded` the same
pages as PyTorch attends to them, `affine` codes in groups of 64. `ratio` is the best torch formulation's time over the
candidate's. Every result is checked against float64 on the dequantized tokens first. `--save` appends to results.csv.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import results
import torch
from bench_attend_cpu import KV_HEADS, PAGE, RATIO, check, pack, stored_bytes, torch_formulations
from kvmix_kernels.attend import AttentionProblem, attend, naive
from kvmix_kernels.layout import Kind
from kvmix_kernels.segments import Segments
from torch import Tensor

from kvmix_cli.cache.packing.encoded import pages_of
from kvmix_cli.codecs.vectors import SPANS, Vectors


def in_vectors(kind: Kind, bits: int, states: Tensor) -> Segments:
    """Return as many tokens in pages of vector codes, which are drawn: to find the nearest would take minutes."""
    batch, heads, tokens, head_dim = states.shape
    codec = Vectors(kind, bits, head_dim, PAGE)
    codes = torch.randint(256, (batch, heads, tokens // PAGE, codec.code_bytes), dtype=torch.uint8)
    parts = {"codes": codes, "scales": torch.rand(batch, heads, tokens // PAGE, PAGE).add(0.5).half()}
    return Segments(None, pages_of(codec, parts), states[:, :, :0])


def measure(context: int, head_dim: int, rounds: int) -> list[dict[str, object]]:
    """Return one row a candidate."""
    torch.manual_seed(0)
    query = torch.randn(1, KV_HEADS * RATIO, 1, head_dim)
    keys, values = (torch.randn(1, KV_HEADS, context, head_dim) for _ in range(2))
    candidates: dict[str, Callable[[], object]] = {**torch_formulations(query, keys, values)}
    formulations = list(candidates)
    tensors = {f"vectors {bits}": (in_vectors("key", bits, keys), in_vectors("value", bits, values)) for bits in SPANS}
    affine = {f"affine {bits}": (pack("key", bits, keys), pack("value", bits, values)) for bits in (2, 4)}
    sizes = {}
    for name, (key, value) in {**tensors, **affine}.items():
        check(query, key, value)
        problem = AttentionProblem(query, key, value, scaling=head_dim**-0.5)
        candidates[f"kvmix {name}"] = functools.partial(attend, problem)
        sizes[f"kvmix {name}"] = stored_bytes(key, value)
        if name in tensors:
            candidates[f"decoded {name}"] = functools.partial(naive.attend, problem)
    times = results.in_turns(candidates, rounds, clock=time.thread_time)
    best = min(times[name] for name in formulations)
    print(f"\ncontext {context}, {head_dim} channels; best torch formulation {best:.2f} ms")
    rows = []
    for name, ms in times.items():
        print(f"  {name:26} {ms:8.2f} ms {best / ms:6.2f}x")
        row = {"op": "vectors-cpu-time", "shape": f"{KV_HEADS}x{RATIO}x{head_dim}", "context": context, "name": name}
        speed = round(sizes[name] / ms / 1e6, 2) if name in sizes else ""
        rows.append({**row, "ms": round(ms, 3), "gb_per_s": speed, "ratio": round(best / ms, 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--contexts", default="16384")
    parser.add_argument("--head-dims", default="128,64")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    contexts, dims = ([int(each) for each in text.split(",")] for text in (options.contexts, options.head_dims))
    rows = [row for context in contexts for dim in dims for row in measure(context, dim, options.rounds)]
    if options.save:
        results.append(rows)


if __name__ == "__main__":
    main()
