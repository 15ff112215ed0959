"""Generation with transformers, from the keys and values that a plan stores.

    python examples/generate.py
    python examples/generate.py --model meta-llama/Llama-2-7b --plan profiles/meta-llama--Llama-2-7b/plans/rank-2.3.yaml

Prompts of different lengths are continued in one batch, with transformers' own cache and with a `MixedCache` of the
plan: what each stores, and how many new tokens are the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Cache, DynamicCache

from kvmix_cli import MixedCache, Plan, load_model
from kvmix_cli.models.loading import LoadedModel

TINY = Path(__file__).parents[1] / "profiles" / "builtin--tiny" / "plans" / "ilp-stored-2.75.yaml"
PROMPTS = (
    "def area(width, height):\n    return width * height\n\n\n" * 60 + "def volume(",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n" * 24,
)
NEW = 24
"""Tokens of each answer."""


def continue_prompts(loaded: LoadedModel, prompts: Sequence[str], cache: Cache) -> tuple[list[list[int]], int]:
    """Return the new tokens after each prompt, and the bytes that the cache then holds."""
    tokenizer: Any = loaded.tokenizer
    tokenizer.padding_side = "left"  # so that every answer begins at the same place
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(loaded.device)
    found = loaded.model.generate(**batch, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    stored = cache.nbytes if isinstance(cache, MixedCache) else 0
    stored = stored or sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return found[:, batch["input_ids"].shape[1] :].tolist(), stored


def main(arguments: Sequence[str] | None = None) -> None:
    """Continue the prompts with both caches and print what is different."""
    parser = argparse.ArgumentParser(description="Generation with transformers and a MixedCache.")
    parser.add_argument("--model", default="builtin:tiny", help="a hub id, a local folder or builtin:tiny")
    parser.add_argument("--plan", default=TINY, help="a plan file of this model, from `kvmix allocate`")
    options = parser.parse_args(arguments)
    loaded, plan = load_model(options.model), Plan.load(options.plan)
    plain, plain_bytes = continue_prompts(loaded, PROMPTS, DynamicCache(config=loaded.config))
    mixed, mixed_bytes = continue_prompts(loaded, PROMPTS, MixedCache.from_plan(plan, loaded.config))
    for before, after in zip(plain, mixed, strict=True):
        print(f"{sum(a == b for a, b in zip(before, after, strict=True))} of {NEW} new tokens are the same:")
        print(loaded.tokenizer.decode(after), end="\n\n")
    print(f"{mixed_bytes / 2**20:.2f} MiB instead of {plain_bytes / 2**20:.2f} ({plan.bits.stored:.2f} stored bits)")


if __name__ == "__main__":
    main()
