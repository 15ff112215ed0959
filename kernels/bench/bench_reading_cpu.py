"""Decode attention of one layer on a CPU that reads the best pages only, against the same cache read as a whole.

    python kernels/bench/bench_reading_cpu.py [--context 32768] [--tokens 2048] [--rounds 41] [--cpu-time] [--save]

Shape of Llama-3.2-1B: 8 KV heads, 4 query heads each, head_dim 64, one query; 4 bits in groups of 64, or of a page's
tokens, if it has fewer. The choice of the pages is in the time; `ratio` is the time of the whole cache over it. Keys
and codes are random, so that the chosen pages are anywhere.

`--cpu-time` is for a machine that does other things at the same time: one thread, and of its time only that in which it
has a core. `--save` appends to results.csv.
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import replace

import results
import torch
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import AttentionProblem, attend
from kvmix_kernels.attend.choice import with_all_pages
from kvmix_kernels.pages import Packed
from kvmix_kernels.quantize import quantize
from kvmix_kernels.segments import Segments
from kvmix_kernels.summaries import Summarized
from torch import Tensor

PARTS, ENTRIES = 2, 64  # of codes, as plans have them
KV_HEADS, RATIO, HEAD_DIM, BITS, GROUP = 8, 4, 64, 4, 64
PAGES = (16, 32, 64, 128)


def pack(kind: str, states: Tensor, page: int) -> Segments:
    """Return all tokens in packed pages."""
    layout = PageLayout(kind, BITS, HEAD_DIM, page, min(GROUP, page))  # type: ignore[arg-type]
    words, scales = quantize(states.unflatten(2, (-1, page)), layout)
    return Segments(None, Packed(layout, words, scales), states[:, :, :0])


def summarized(keys: Segments, states: Tensor, page: int, kind: str, tokens: int) -> Segments:
    """Return the same keys with summaries, of which a query reads so many tokens."""
    pages, held = states.unflatten(2, (-1, page)), keys.packed
    if not isinstance(held, Packed):
        raise TypeError(held)
    if kind == "codes":
        codes = torch.randint(ENTRIES, (*pages.shape[:4], PARTS), dtype=torch.uint8)
        books = torch.randn(1, KV_HEADS, PARTS, ENTRIES, HEAD_DIM // PARTS).to(states.dtype)
        return replace(keys, packed=Summarized(held, codes, tokens // page, books=books))
    ends = torch.stack([pages.amin(3), pages.amax(3)], dim=3)
    summary = pages.mean(3, keepdim=True) if kind == "mean" else ends
    return replace(keys, packed=Summarized(held, summary, tokens // page))


def measure(context: int, tokens: int, rounds: int, cpu_time: bool) -> list[dict[str, object]]:
    """Return one row a way to read."""
    torch.manual_seed(0)
    query = torch.randn(1, KV_HEADS * RATIO, 1, HEAD_DIM).bfloat16()
    keys, values = (torch.randn(1, KV_HEADS, context, HEAD_DIM).bfloat16() for _ in range(2))
    problems = {}
    for page in PAGES:
        key, value = pack("key", keys, page), pack("value", values, page)
        for kind in ("mean", "range", "codes"):
            problem = AttentionProblem(query, summarized(key, keys, page, kind, tokens), value, HEAD_DIM**-0.5)
            problems[f"page {page}, {kind}"] = problem
        problems[f"page {page}, all"] = with_all_pages(problem)
    by_kind = sorted(problems, key=lambda name: name.partition(", ")[2])  # no two in a row read the same pages
    runs = {name: functools.partial(attend, problems[name]) for name in by_kind}
    times = results.in_turns(runs, rounds, clock=time.thread_time if cpu_time else time.perf_counter)
    print(f"context {context}, {tokens} tokens read, {torch.get_num_threads()} threads")
    rows = []
    for name, ms in times.items():
        ratio = times[f"{name.partition(',')[0]}, all"] / ms
        print(f"  {name:16} {ms:7.3f} ms, {ratio:.2f}x as fast as all")
        op = "reading cpu-time" if cpu_time else "reading"
        row = {"op": op, "shape": f"{KV_HEADS}x{RATIO}x{HEAD_DIM}", "context": context, "name": name}
        rows.append({**row, "ms": round(ms, 3), "gb_per_s": "", "ratio": round(ratio, 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    rows = measure(options.context, options.tokens, options.rounds, options.cpu_time)
    if options.save:
        results.append(rows)


if __name__ == "__main__":
    main()
