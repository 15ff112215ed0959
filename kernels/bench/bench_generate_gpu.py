"""Decoding with a Llama-2-7B-shaped model on a GPU: tokens/s and memory, packed cache against DynamicCache with SDPA.

    python kernels/bench/bench_generate_gpu.py [--settings 688+1024,8192+512] [--steps 64] [--out FOLDER]

Weights are random. The paper's setting is 688 tokens in and 1024 out. At equal batch, and then at each cache's largest:
the largest power of two that ends the generation within memory. Every cache is filled with the same number of random
tokens, to the middle of the generation, and `--steps` tokens are decoded and timed from there: all candidates do the
same work. Peak memory is of a cache filled to the end. `ratio` is tokens/s over DynamicCache's.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gpu
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from kvmix_cli.cache import MixedCache, unquantized_cache
from kvmix_cli.plan import ModelInfo, Plan

LAYERS, KV_HEADS, HEAD_DIM = 32, 32, 128
INFO = ModelInfo(id="random-7b", layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
PAPER_PLAN = "0-5:k3v4,6-31:k2v2"
"""K2.19 V2.38 on average: a fifth of the layers with 3-bit keys and 4-bit values, the others with 2 bits."""
EQUAL_BATCH = 8
LARGEST_BATCH = 512
WARMUP = 4


def model() -> PreTrainedModel:
    """The shape of Llama-2-7B in bf16, with random weights."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=16384,
    )
    with torch.device("meta"):
        made = LlamaForCausalLM(config)
    made = made.to(torch.bfloat16).to_empty(device="cuda")
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    made.model.rotary_emb = type(made.model.rotary_emb)(config).to("cuda")
    return made.eval()


def caches(config: LlamaConfig, reserve: int) -> dict[str, tuple[Callable[[], Cache], str]]:
    """What is compared: how to make it, and the attention that reads it."""
    plans = {"kvmix K2.19 V2.38": Plan.from_short(PAPER_PLAN, INFO), "kvmix 4": Plan.uniform(INFO, 4, 4)}
    made: dict[str, tuple[Callable[[], Cache], str]] = {
        "DynamicCache, SDPA": (lambda: unquantized_cache(config), "sdpa")
    }
    for name, plan in plans.items():
        made[name] = (lambda plan=plan: MixedCache.from_plan(plan, config, reserve=reserve), "kvmix")
    return made


@torch.no_grad()
def fill(cache: Cache, batch: int, tokens: int) -> None:
    """Random keys and values, as a prompt of as many tokens leaves them."""
    for layer in range(LAYERS):
        keys, values = (
            torch.randn(batch, KV_HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2)
        )
        cache.update(keys, values, layer)


@torch.no_grad()
def decode(llama: PreTrainedModel, cache: Cache, attention: str, batch: int, steps: int) -> float:
    """Median seconds of one step."""
    llama.set_attn_implementation(attention)
    token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    seconds = []
    for _ in range(WARMUP + steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        token = llama(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARMUP:])


def peak_bytes(
    make: Callable[[], Cache], llama: PreTrainedModel, attention: str, batch: int, tokens: int
) -> int | None:
    """The most memory taken until a cache has this many tokens and decodes; None if that does not fit."""
    clear()
    try:
        cache = make()
        fill(cache, batch, tokens)
        decode(llama, cache, attention, batch, 1)
        return torch.cuda.max_memory_allocated()
    except torch.cuda.OutOfMemoryError:
        return None


def clear() -> None:
    """Give back what the last cache held, and count from here."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def largest(make: Callable[[], Cache], llama: PreTrainedModel, attention: str, tokens: int) -> int:
    """The largest power of two that fits, at least 1."""
    batch = 1
    while batch < LARGEST_BATCH and peak_bytes(make, llama, attention, 2 * batch, tokens) is not None:
        batch *= 2
    return batch


def measure(llama: PreTrainedModel, prompt: int, new: int, steps: int) -> list[dict[str, object]]:
    """One row a cache at equal batch, and one at its largest."""
    rows: list[dict[str, object]] = []
    baseline: dict[str, float] = {}
    for at_largest in (False, True):
        for name, (make, attention) in caches(llama.config, prompt + new).items():
            batch = largest(make, llama, attention, prompt + new) if at_largest else EQUAL_BATCH
            peak = peak_bytes(make, llama, attention, batch, prompt + new)
            if peak is None:
                print(f"  {name:20} batch {batch:4} does not fit")
                continue
            clear()
            cache = make()
            fill(cache, batch, prompt + new // 2 - steps // 2)
            seconds = decode(llama, cache, attention, batch, steps)
            del cache
            speed = batch / seconds
            kind = "largest batch" if at_largest else "equal batch"
            ratio = speed / baseline.setdefault(kind, speed)
            print(f"  {kind} {name:20} batch {batch:4} {speed:9.1f} tok/s {peak / 2**30:6.1f} GiB {ratio:5.2f}x")
            row = {"op": "decode-gpu", "shape": f"{INFO.id} batch {batch}, {peak / 2**30:.1f} GiB", "context": prompt}
            measured = {"name": f"{name}, {kind}, {new} out", "ms": round(seconds * 1e3, 3), "gb_per_s": ""}
            rows.append({**row, **measured, "ratio": round(ratio, 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--settings", default="688+1024,8192+512")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--out", type=Path, help="folder to write results.csv to")
    options = parser.parse_args()
    gpu.require_gpu()
    llama = model()
    for setting in options.settings.split(","):
        prompt, new = (int(count) for count in setting.split("+"))
        print(f"\n{torch.cuda.get_device_name()}, {prompt} tokens in, {new} out")
        gpu.save(measure(llama, prompt, new, options.steps), options.out)


if __name__ == "__main__":
    main()
