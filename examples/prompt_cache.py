"""A long prompt that is read once: its packed cache is a file, which later prompts with the same beginning take.

    python examples/prompt_cache.py                                              # keeps the cache in shared.safetensors
    python examples/prompt_cache.py --text notes.txt --file notes.safetensors    # a text of your own

The second time, only what follows the shared text is read. `kvmix run --save-cache` and `--load-cache` do the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import kvmix_cli
from kvmix_cli import MixedCache, Plan, load_model
from kvmix_cli.models.loading import LoadedModel

TEXT = Path(kvmix_cli.__file__).parent / "cache" / "store.py"
ENDINGS = ("\n\n\ndef make_cache(", "\n\n\nclass Reader:\n    def __init__(self")
NEW = 16
"""Tokens of each answer."""


def keep(loaded: LoadedModel, plan: Plan, text: str, file: Path) -> None:
    """Read a text into a cache of the plan, and write the cache to a file."""
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids.to(loaded.device)
    cache = MixedCache.from_plan(plan, loaded.config)
    with torch.inference_mode():
        loaded.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    cache.save(file, ids, loaded.model)
    plain = plan.unquantized_bytes(ids.shape[1])
    size = file.stat().st_size
    print(f"{ids.shape[1]} tokens in {file}: {size / 2**20:.2f} MiB, {plain / size:.1f} times less than in bfloat16")


def answer(loaded: LoadedModel, plan: Plan, prompt: str, file: Path) -> None:
    """Continue a prompt from the cache in a file, and print the answer and what was not read again."""
    inputs = loaded.tokenizer(prompt, return_tensors="pt").to(loaded.device)
    start = time.perf_counter()
    cache = MixedCache.load(file, plan, loaded.model, ids=inputs.input_ids)
    held, seconds = cache.get_seq_length(), time.perf_counter() - start
    found = loaded.model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    tokens = inputs.input_ids.shape[1]
    print(f"{held} of {tokens} tokens were in the file, loaded in {1000 * seconds:.0f} ms:")
    print(loaded.tokenizer.decode(found[0, tokens:]), end="\n\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Keep the cache of a text, unless the file is there, and continue the text in two ways."""
    parser = argparse.ArgumentParser(description="Packed prompt caches.")
    parser.add_argument("--model", default="builtin:tiny", help="a hub id, a local folder or builtin:tiny")
    parser.add_argument("--text", type=Path, default=TEXT, help="the text that all prompts begin with")
    parser.add_argument("--file", type=Path, default=Path("shared.safetensors"), help="where its cache is kept")
    parser.add_argument("--bits", type=int, default=2, help="bits of keys and values")
    options = parser.parse_args(arguments)
    loaded = load_model(options.model)
    plan = Plan.uniform(loaded.info, options.bits, options.bits)
    text = options.text.read_text()
    if not options.file.exists():
        keep(loaded, plan, text, options.file)
    for ending in ENDINGS:
        answer(loaded, plan, text + ending, options.file)


if __name__ == "__main__":
    main()
