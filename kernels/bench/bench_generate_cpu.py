"""Decoding with a whole model on a CPU: tokens/s and memory of each cache at the same context, in one process.

    python kernels/bench/bench_generate_cpu.py [--contexts 4096,16384] [--model builtin:tiny] [--dtype float32] [--save]

Without `--model`: a randomly initialised Llama of about 1B parameters. SDPA reads transformers' caches; our attention
reads ours, and is also tried on DynamicCache. The context is random keys and values that are put into every cache
alike, since a prompt of that length takes minutes on a CPU and is not what is measured. Each step decodes one token;
caches take turns step by step, and medians are reported. `ratio` is DynamicCache's time over the candidate's. The sizes
of transformers' quantized caches are left out: their tensors do not tell them.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import results
import torch
from resident import peak_nbytes
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, QuantizedCache

from kvmix_cli.cache import register
from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.cache.sizes import cache_nbytes
from kvmix_cli.models.loading import load_model
from kvmix_cli.plan import ModelInfo, Plan

WARMUP = 2
BIG = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
}


def model_of(
    name: str | None, dtype: torch.dtype, *, is_blank: bool = False, shape: Mapping[str, Any] = BIG
) -> tuple[PreTrainedModel, ModelInfo]:
    """Return a model and what plans know of it; without a name, weights are random, or zeros, which are made faster."""
    if name:
        loaded = load_model(name, dtype=str(dtype).removeprefix("torch."))
        return loaded.model, loaded.info
    config = LlamaConfig(**shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter) if is_blank else torch.nn.init.normal_(parameter, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.set_attn_implementation("kvmix")
    size = model.num_parameters()
    name = f"random-{size / 1e9:.0f}b" if size > 1e9 else f"random-{size / 1e6:.0f}m"
    layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
    return model.eval(), ModelInfo(id=name, layers=layers, kv_heads=kv_heads, head_dim=config.head_dim)


class Candidate(NamedTuple):
    """A cache, and the attention that reads it."""

    make: Callable[[], Cache]
    attention: str = "sdpa"


def candidates(model: PreTrainedModel, info: ModelInfo, reserve: int) -> dict[str, Candidate]:
    """Return the caches that are compared, by name."""
    config, last = model.config, info.layers - 1
    mixed = f"0-{info.layers // 5}:k3v4,{info.layers // 5 + 1}-{last}:k2v2"
    plans = {
        "kvmix 4": Plan.uniform(info, 4, 4),
        "kvmix 2": Plan.uniform(info, 2, 2),
        "kvmix mixed": Plan.from_short(mixed, info),
        "kvmix 16": Plan.uniform(info, 16, 16),
    }
    made = {
        "DynamicCache": Candidate(lambda: unquantized_cache(config)),
        "DynamicCache, our attention": Candidate(lambda: unquantized_cache(config), "kvmix"),
    }
    for name, plan in plans.items():
        made[name] = Candidate(lambda plan=plan: MixedCache.from_plan(plan, config, reserve=reserve), "kvmix")
    for backend in ("quanto", "hqq"):
        made[f"QuantizedCache {backend} 4"] = Candidate(
            lambda backend=backend: QuantizedCache(backend, config, nbits=4)
        )
    return made


@torch.no_grad()
def fill(
    cache: Cache,
    info: ModelInfo,
    context: int,
    dtype: torch.dtype,
    then: Callable[[CacheLayerMixin], None] = lambda layer: None,
) -> None:
    """Make the same random context for every cache; `then` is called with each layer that has it, before the next."""
    generator = torch.Generator().manual_seed(0)
    for layer in range(info.layers):
        shape = (1, info.kv_heads, context, info.head_dim)
        keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        cache.update(keys, values, layer)
        then(cache.layers[layer])


def measure(
    name: str | None, context: int, rounds: int, dtype: torch.dtype, only: str | None = None
) -> list[dict[str, object]]:
    """One row a cache that is installed, each with the same random context in it."""
    model, info = model_of(name, dtype)
    token = torch.zeros(1, 1, dtype=torch.long)
    held: dict[str, Cache] = {}
    steps: dict[str, Callable[[], object]] = {}

    @torch.no_grad()
    def step(cache: Cache, attention: str) -> object:
        model.config._attn_implementation = attention
        return model(token, past_key_values=cache)

    for label, candidate in candidates(model, info, context + rounds + WARMUP).items():
        if only not in (None, label):
            continue
        try:
            held[label] = candidate.make()
        except ImportError as error:
            print(f"  {label:28} not installed: {error}")
            continue
        fill(held[label], info, context, dtype)
        steps[label] = functools.partial(step, held[label], candidate.attention)
    times = results.in_turns(steps, rounds, WARMUP)
    baseline = times.get("DynamicCache", next(iter(times.values())))
    print(f"\n{info.id}, {dtype}, context {context}, {torch.get_num_threads()} threads")
    rows = []
    for label, ms in times.items():
        size = "" if label.startswith("Quantized") else f"{cache_nbytes(held[label]) / 2**20:8.1f} MiB"
        print(f"  {label:28} {ms:8.1f} ms {1e3 / ms:7.2f} tok/s {baseline / ms:6.2f}x {size}")
        row = {"op": "decode", "shape": f"{info.id} {dtype}", "context": context, "name": label}
        rows.append({**row, "ms": round(ms, 2), "gb_per_s": "", "ratio": round(baseline / ms, 2)})
    return rows


def main() -> None:
    register()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--contexts", default="4096,16384")
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true")
    parser.add_argument(
        "--only", metavar="CACHE", help="one cache by its name, and the peak memory of the process with it"
    )
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    rows = [
        row
        for context in options.contexts.split(",")
        for row in measure(options.model, int(context), options.rounds, dtype, options.only)
    ]
    if options.only:
        print(f"  peak memory {peak_nbytes() / 2**20:.0f} MiB")
    elif options.save:
        results.append(rows)


if __name__ == "__main__":
    main()
