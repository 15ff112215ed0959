"""Decoding with a Llama-2-7B-shaped model on a GPU: tokens/s and memory, packed cache against DynamicCache with SDPA.

    python kernels/bench/bench_generate_gpu.py [--settings 688+1024,8192+512] [--steps 64] [--out FOLDER] [--dry-run]

Weights are random. The paper's setting is 688 tokens in and 1024 out. At equal batch, and then at each cache's largest:
the largest power of two that ends the generation within memory. Every cache is filled with the same number of random
tokens, to the middle of the generation, and `--steps` tokens are decoded and timed from there; a cache that then holds
another number of tokens than it should is refused. Peak memory is of a cache filled to the end. `ratio` is tokens/s
over DynamicCache's; one above both that of the batches and that of the bytes a sequence takes is an error, not a
result: weights are read once a step, and a cache once a sequence.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import gpu
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from kvmix_cli.cache import register
from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.cache.sizes import cache_nbytes
from kvmix_cli.plan import ModelInfo, Plan
from kvmix_cli.plan.settings import CacheSettings

LAYERS, KV_HEADS, HEAD_DIM = (1, 1, 64) if gpu.DRY else (32, 32, 128)
INFO = ModelInfo(id="random-7b", layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
PAPER_PLAN = "0:k3v4" if gpu.DRY else "0-5:k3v4,6-31:k2v2"
"""K2.19 V2.38 on average: a fifth of the layers with 3-bit keys and 4-bit values, the others with 2 bits."""
PAPER_CACHE = CacheSettings.model_validate({"page": 32, "sink": 0, "group_size": 32, "window": {"kind": "rpc"}})
"""That of the preset `kvmix-paper`."""
EQUAL_BATCH, LARGEST_BATCH = (1, 1) if gpu.DRY else (8, 512)
WARMUP = 0 if gpu.DRY else 4


def model() -> PreTrainedModel:
    """Build a model of the shape of Llama-2-7B in bf16, with random weights."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=KV_HEADS * HEAD_DIM,
        intermediate_size=11008 * KV_HEADS // 32,
        num_hidden_layers=LAYERS,
        num_attention_heads=KV_HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=16384,
    )
    with torch.device("meta"):
        made = LlamaForCausalLM(config)
    made = made.to(torch.bfloat16).to_empty(device=gpu.DEVICE)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    made.model.rotary_emb = type(made.model.rotary_emb)(config).to(gpu.DEVICE)
    return made.eval()


def caches(config: LlamaConfig, reserve: int) -> dict[str, tuple[Callable[[], Cache], str]]:
    """Return the caches that are compared: a function that makes each, and the attention that reads it."""
    plans = {
        "kvmix K2.19 V2.38": Plan.from_short(PAPER_PLAN, INFO),
        "kvmix-paper": Plan.from_short(PAPER_PLAN, INFO, PAPER_CACHE),
        "kvmix 4": Plan.uniform(INFO, 4, 4),
    }
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
            torch.randn(batch, KV_HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16, device=gpu.DEVICE) for _ in range(2)
        )
        cache.update(keys, values, layer)


@torch.no_grad()
def decode(llama: PreTrainedModel, cache: Cache, attention: str, batch: int, steps: int) -> float:
    """Median seconds of one step."""
    llama.set_attn_implementation(attention)
    token = torch.zeros(batch, 1, dtype=torch.long, device=gpu.DEVICE)
    seconds = []
    for _ in range(WARMUP + steps):
        gpu.synchronize()
        start = time.perf_counter()
        token = llama(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        gpu.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARMUP:])


def peak_bytes(
    make: Callable[[], Cache], llama: PreTrainedModel, attention: str, batch: int, tokens: int
) -> int | None:
    """Return the most memory taken until a cache has this many tokens and decodes; None if that does not fit."""
    gpu.forget()
    try:
        cache = make()
        fill(cache, batch, tokens)
        decode(llama, cache, attention, batch, 1)
        return gpu.peak_memory()
    except torch.cuda.OutOfMemoryError:
        return None


def largest(make: Callable[[], Cache], llama: PreTrainedModel, attention: str, tokens: int) -> int:
    """Return the largest power of two that fits, at least 1."""
    batch = EQUAL_BATCH
    while batch > 1 and peak_bytes(make, llama, attention, batch, tokens) is None:
        batch //= 2
    while EQUAL_BATCH <= batch < LARGEST_BATCH and peak_bytes(make, llama, attention, 2 * batch, tokens) is not None:
        batch *= 2
    return batch


def measure(llama: PreTrainedModel, prompt: int, new: int, steps: int) -> list[dict[str, object]]:
    """One row a cache at equal batch, and one at its largest."""
    rows: list[dict[str, object]] = []
    for at_largest in (False, True):
        kind = "largest batch" if at_largest else "equal batch"
        baseline: tuple[float, int, float] | None = None
        for name, (make, attention) in caches(llama.config, prompt + new).items():
            batch = largest(make, llama, attention, prompt + new) if at_largest else EQUAL_BATCH
            peak = peak_bytes(make, llama, attention, batch, prompt + new)
            if peak is None:
                print(f"  {name:20} batch {batch:4} does not fit")
                continue
            gpu.forget()
            cache, first = make(), prompt + new // 2 - steps // 2
            fill(cache, batch, first)
            seconds = decode(llama, cache, attention, batch, steps)
            if cache.get_seq_length() != first + WARMUP + steps:
                raise SystemExit(f"{name} holds {cache.get_seq_length()} tokens after {steps} steps: unequal work")
            speed, nbytes = batch / seconds, cache_nbytes(cache) / batch
            del cache
            baseline = baseline or (speed, batch, nbytes)
            gain, most = speed / baseline[0], max(batch / baseline[1], baseline[2] / nbytes)
            note = "  ERROR: faster than its bytes allow" if gain > most * 1.02 and not gpu.DRY else ""
            print(f"  {kind} {name:20} batch {batch:4} {speed:9.1f} tok/s {peak / 2**30:6.1f} GiB {gain:5.2f}x{note}")
            row = {"op": "decode-gpu", "shape": f"{INFO.id} batch {batch}, {peak / 2**30:.1f} GiB", "context": prompt}
            measured = {"name": f"{name}, {kind}, {new} out{note}", "ms": round(seconds * 1e3, 3), "gb_per_s": ""}
            rows.append({**row, **measured, "ratio": round(gain, 3)})
    return rows


def main() -> None:
    register()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--settings", default="688+1024,8192+512")
    parser.add_argument("--steps", type=int, default=64)
    options = gpu.parse(parser)
    llama = model()
    for setting in options.settings.split(","):
        prompt, new = (int(count) for count in setting.split("+"))
        print(f"\n{gpu.name()}, {prompt} tokens in, {new} out")
        gpu.save(measure(llama, prompt, new, options.steps), options.out)


if __name__ == "__main__":
    main()
