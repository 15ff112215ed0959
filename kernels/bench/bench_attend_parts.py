"""Decode attention of one layer on a CPU: token tiers and channel runs against caches of one width at equal bytes.

    python kernels/bench/bench_attend_parts.py [--context 16384] [--rounds 41] [--cpu-time] [--save]

Shape of Llama-3-8B: 8 KV heads, 4 query heads each, head_dim 128, one query. Pages of 128, groups of 64. Everything
attends to the same number of tokens. No single width has the bytes of a mixture, so a mixture is compared with two of
them, in the shares that make the bytes equal: what a plan with some layers at the one width and some at the other
takes. Of all such pairs the fastest counts. `ratio` is its time over the mixture's. Channel runs are keys, with values
at 2 bits on both sides; every page has its own order of channels.

`--cpu-time` is for a machine that does other things at the same time: one thread, and of its time only that in which it
has a core. `--save` appends to results.csv.
"""

from __future__ import annotations

import argparse
import functools
import time
from itertools import product

import results
import torch
from bench_attend_cpu import GROUP, HEAD_DIM, KV_HEADS, PAGE, RATIO, check, pack
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import AttentionProblem, attend
from kvmix_kernels.pages import Channels, Packed, Plain
from kvmix_kernels.quantize import quantize
from kvmix_kernels.segments import Segments
from kvmix_kernels.sorted_tokens import Tiers
from torch import Tensor

WIDTHS = (2, 3, 4, 8)
SHARES = {8: 0.2, 2: 0.8}
RUNS = {"16, 4, 2": ((16, 16), (32, 4), (80, 2)), "8, 4, 2": ((16, 8), (32, 4), (80, 2))}
"""Channels and bits of keys."""


def tiers(keys: Tensor, values: Tensor) -> tuple[Segments, Segments]:
    """Return tokens at random in two tiers, whole pages of each."""
    pages = keys.shape[2] // PAGE
    first = round(SHARES[8] * pages) * PAGE
    tier = (torch.arange(keys.shape[2]) >= first).to(torch.uint8).expand(1, KV_HEADS, -1)
    tier = tier.gather(2, torch.rand(tier.shape).argsort(dim=-1))
    made = []
    for kind, states in (("key", keys), ("value", values)):
        places = tier.long().sort(dim=-1, stable=True).indices[..., None].expand_as(states)
        parts = states.gather(2, places).split([first, keys.shape[2] - first], dim=2)
        held = tuple(pack(kind, bits, part).packed for bits, part in zip(SHARES, parts, strict=True))
        made.append(Segments(None, Tiers(tier, held), states[:, :, :0]))
    return made[0], made[1]


def channels(runs: tuple[tuple[int, int], ...], keys: Tensor) -> Segments:
    """Return keys in runs of channels, bfloat16 where they are not quantized; every page in an order of its own."""
    pages = keys.unflatten(2, (-1, PAGE))
    order = torch.rand(1, KV_HEADS, pages.shape[2], HEAD_DIM).argsort(dim=-1)
    parts = pages.gather(-1, order[:, :, :, None].expand_as(pages)).split([width for width, _ in runs], dim=-1)
    made: list[Packed | Plain] = []
    for (width, bits), part in zip(runs, parts, strict=True):
        if bits == 16:
            made.append(Plain(part.mT.bfloat16().contiguous()))
        else:
            layout = PageLayout("key", bits, width, PAGE, GROUP)
            made.append(Packed(layout, *quantize(part, layout)))
    return Segments(None, Channels(order.to(torch.uint8), 1, tuple(made)), keys[:, :, :0])


def read_bytes(packed: object) -> int:
    """Return the bytes that attention has to read."""
    match packed:
        case Tiers(held=held):
            return sum(read_bytes(each) for each in held)
        case Channels(order=order, runs=runs):
            return order.nbytes + sum(read_bytes(run) for run in runs)
        case Plain(states=states):
            return states.nbytes
        case Packed(words=words, scales=scales):
            return words.nbytes + scales.nbytes
    raise TypeError(packed)


def at_equal_bytes(size: int, singles: dict[str, int], times: dict[str, float]) -> tuple[float, str]:
    """Return the least time of two single widths in the shares that have `size` bytes together, and their names."""
    mixed = []
    for low, high in product(singles, repeat=2):
        if singles[low] <= size < singles[high]:
            share = (singles[high] - size) / (singles[high] - singles[low])
            mixed.append((share * times[low] + (1 - share) * times[high], f"{share:.0%} {low}, {1 - share:.0%} {high}"))
    return min(mixed)


def measure(context: int, rounds: int, cpu_time: bool) -> list[dict[str, object]]:
    """Return one row a candidate."""
    torch.manual_seed(0)
    query = torch.randn(1, KV_HEADS * RATIO, 1, HEAD_DIM)
    keys, values = (torch.randn(1, KV_HEADS, context, HEAD_DIM) for _ in range(2))
    low = pack("value", 2, values)
    uniform = {f"{bits}": (pack("key", bits, keys), pack("value", bits, values)) for bits in WIDTHS}
    uniform_keys = {f"K{bits} V2": (pack("key", bits, keys), low) for bits in WIDTHS}
    mixtures = {"tiers 8, 2": (tiers(keys, values), uniform)}
    mixtures |= {f"K runs {name}": ((channels(runs, keys), low), uniform_keys) for name, runs in RUNS.items()}
    caches = {**uniform, **uniform_keys, **{name: pair for name, (pair, _) in mixtures.items()}}
    for pair in caches.values():
        check(query, *pair)
    problems = {name: AttentionProblem(query, *pair, scaling=HEAD_DIM**-0.5) for name, pair in caches.items()}
    runs = {name: functools.partial(attend, problem) for name, problem in problems.items()}
    times = results.in_turns(runs, rounds, clock=time.thread_time if cpu_time else time.perf_counter)
    sizes = {name: sum(read_bytes(each.packed) for each in pair) for name, pair in caches.items()}
    print(f"context {context}, {torch.get_num_threads()} threads")
    rows = []
    for name, ms in times.items():
        _, singles = mixtures.get(name, (None, None))
        best, which = at_equal_bytes(sizes[name], {x: sizes[x] for x in singles}, times) if singles else (ms, "itself")
        speed, bits = sizes[name] / ms / 1e6, 8 * sizes[name] / (2 * keys.numel())
        print(f"  {name:16} {bits:5.2f} bits {ms:7.3f} ms {speed:6.1f} GB/s, {ms / best:.2f}x the time of {which}")
        op = "attend-parts cpu-time" if cpu_time else "attend-parts"
        row = {"op": op, "shape": f"{KV_HEADS}x{RATIO}x{HEAD_DIM}", "context": context, "name": name}
        rows.append({**row, "ms": round(ms, 3), "gb_per_s": round(speed, 2), "ratio": round(best / ms, 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    rows = measure(options.context, options.rounds, options.cpu_time)
    if options.save:
        results.append(rows)


if __name__ == "__main__":
    main()
