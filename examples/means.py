"""Means of a model's keys and values, for `center` with `means` (docs/transforms.md).

    python examples/means.py builtin:tiny means.safetensors
    python examples/means.py meta-llama/Llama-2-7b means.safetensors --text c4 --samples 32 --length 2048

Writes `layers.N.k` and `layers.N.v`, each `[H_kv, D]` in float32, over all tokens of the calibration text.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import Cache

from kvmix_cli import console, load_model
from kvmix_cli.cache.mixed import unquantized_cache
from kvmix_cli.decoding.feed import prefill
from kvmix_cli.errors import KvmixError
from kvmix_cli.files import write_bytes
from kvmix_cli.models.geometry import stock_layers
from kvmix_cli.models.loading import LoadedModel
from kvmix_cli.texts import load_texts
from kvmix_cli.texts.tokens import cut_samples


@torch.inference_mode()
def prompt(loaded: LoadedModel, ids: Sequence[int]) -> Cache:
    """Return the unquantized cache after these tokens."""
    cache = unquantized_cache(loaded.model.config)
    prefill(loaded, cache, ids)
    return cache


def means(loaded: LoadedModel, samples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return the mean of every channel, by layer: `[H_kv, D]` each. Layers without a quantized cache have none."""
    stock = stock_layers(loaded.model.config)
    sums: dict[str, Tensor] = {}
    for ids in samples:
        for number, layer in enumerate(prompt(loaded, ids).layers):
            if number not in stock:
                for side, states in (("k", layer.keys), ("v", layer.values)):
                    name = f"layers.{number}.{side}"
                    sums[name] = sums.get(name, 0) + states.double().sum(dim=2)[0].cpu()
    tokens = sum(map(len, samples))
    return {name: (total / tokens).float() for name, total in sums.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder or builtin:tiny")
    parser.add_argument("file", type=Path, help="safetensors file to write")
    parser.add_argument("--text", default="builtin", help="calibration text, as for `kvmix profile`")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--seed", type=int, default=0, help="chooses the samples")
    given = parser.parse_args(arguments)
    try:
        loaded = load_model(given.model)
        texts = load_texts(given.text, seed=given.seed)
        limit = loaded.max_length
        samples = cut_samples(loaded.tokenizer, texts, given.samples, given.length, given.seed, max_length=limit)
        write_bytes(given.file, save(means(loaded, samples)))
    except KvmixError as error:
        console.fail(error)
        raise SystemExit(1) from error
    console.notice(f"{given.file}: means of {sum(map(len, samples))} tokens")


if __name__ == "__main__":
    main()
