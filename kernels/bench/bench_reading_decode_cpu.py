"""Decoding a whole model on a CPU with a cache that reads the best pages only, against the same cache read as a whole.

    python kernels/bench/bench_reading_decode_cpu.py [--shape 1b] [--context 32768] [--batch 1] [--cpu-time]

The real cache at 4 bits, in pages of `--page` tokens and groups as long. A token reads all of them, or `--tokens` in
the pages whose range of keys promises most, the choice of which is in the time: two attentions over one cache, in
turns, one token each; medians, weights in bfloat16. Without `--model` these are random, of the shape of SmolLM2-360M or
Llama-3.2-1B. The context is random keys and values that are put into the cache, the same for all sequences of a batch,
since a prompt of this length takes hours here; which pages are read therefore means nothing, how many of them does. `no
context` is a cache of one window, which tells what of a token is not attention. `ratio` is the time of reading all over
the row's.

`--cpu-time` is for a machine that does other things at the same time: one thread, and of its time only that in which it
has a core. `--save` appends to results.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import results
import torch
from bench_generate_cpu import BIG, model_of
from kvmix_kernels.summaries import Summarized
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kvmix_cli.cache import register
from kvmix_cli.cache.attention import NAME, kvmix_attention
from kvmix_cli.cache.handle import Handle
from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.decoding.footprint import cache_nbytes
from kvmix_cli.plan import CacheSettings, ModelInfo, Plan
from kvmix_cli.plan.reading import SelectiveReading
from kvmix_cli.plan.windows import Recent

ALL = "kvmix_all_pages"
"""The name of an attention that reads all pages."""
BITS, WINDOW, WARMUP = 4, 64, 2
SHAPES = {
    "1b": BIG,
    "360m": {
        "vocab_size": 49152,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "max_position_embeddings": 131072,
    },
}
"""Llama-3.2-1B's and SmolLM2-360M's."""


def read_all(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, None]:
    """Attend as kvmix does, to all pages of a cache that would let a query choose."""
    if isinstance(key, Handle) and isinstance(pages := key.segments.packed, Summarized):
        key = Handle(replace(key.segments, packed=replace(pages, count=pages.pages)))
    return kvmix_attention(module, query, key, *rest, **more)


def cache_of(model: nn.Module, info: ModelInfo, context: int, options: argparse.Namespace) -> MixedCache:
    """Return a cache with random keys and values."""
    reading = SelectiveReading(tokens=options.tokens, summary="range", skip=options.skip)
    settings = CacheSettings(
        page=options.page, group_size=options.page, sink=4, window=Recent(tokens=WINDOW), reading=reading
    )
    plan = Plan.uniform(info, BITS, BITS, settings)
    cache = MixedCache.from_plan(plan, model.config, reserve=context + 2 * (options.rounds + WARMUP))
    for layer in range(info.layers):
        keys, values = (torch.randn(1, info.kv_heads, context, info.head_dim).bfloat16() for _ in range(2))
        cache.update(keys.expand(options.batch, -1, -1, -1), values.expand(options.batch, -1, -1, -1), layer)
    return cache


@torch.no_grad()
def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """Return one row a way to read."""
    model, info = model_of(options.model, torch.bfloat16, shape=SHAPES[options.shape])
    token = torch.zeros(options.batch, 1, dtype=torch.long)
    long, short = (cache_of(model, info, context, options) for context in (options.context, WINDOW))
    size = cache_nbytes(long) / 2**20

    def step(cache: MixedCache, attention: str) -> object:
        model.config._attn_implementation = attention
        return model(token, past_key_values=cache)

    steps: dict[str, Callable[[], object]] = {
        "all": lambda: step(long, ALL),
        "range": lambda: step(long, NAME),
        "no context": lambda: step(short, NAME),
    }
    clock = time.thread_time if options.cpu_time else time.perf_counter
    times = results.in_turns(steps, options.rounds, WARMUP, clock)
    print(f"{info.id}, batch {options.batch}, context {options.context}, {options.tokens} tokens read in pages of")
    print(f"{options.page}, {size:.0f} MiB, {torch.get_num_threads()} threads")
    rows = []
    for name, ms in times.items():
        ratio, share = times["all"] / ms, 1 - times["no context"] / ms
        speed = 1e3 * options.batch / ms
        print(f"  {name:10} {ms:8.1f} ms, {speed:6.2f} tokens/s, {ratio:.2f}x as fast, {share:.0%} of it attention")
        op = "reading decode cpu-time" if options.cpu_time else "reading decode"
        row = {"op": op, "shape": f"{info.id} batch {options.batch}", "context": options.context}
        rows.append(
            {
                **row,
                "name": f"page {options.page}, {name}",
                "ms": round(ms, 2),
                "gb_per_s": "",
                "ratio": round(ratio, 2),
            }
        )
    return rows


def main() -> None:
    register()
    AttentionInterface.register(ALL, read_all)
    AttentionMaskInterface.register(ALL, sdpa_mask)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="hub id, folder or builtin:tiny")
    parser.add_argument("--shape", choices=SHAPES, default="360m", help="of random weights")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--page", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048, help="that are read of the context")
    parser.add_argument("--skip", type=int, default=0, help="first layers that read everything")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    rows = measure(options)
    if options.save:
        results.append(rows)


if __name__ == "__main__":
    main()
