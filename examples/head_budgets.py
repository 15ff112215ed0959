"""A plan whose KV heads keep different shares of the tokens: those that KVzip's scores of calibration text give them.

    python examples/head_budgets.py builtin:tiny plan.yaml

Each prompt is read again against itself. Of the tokens of all KV heads of a layer together the better half counts, and
each head gets the share of it that it has in the mean over prompts, in quarters. The tokens themselves are chosen by
KVzip's scores of each prompt, as in the preset `kvzip`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.decoding.feed import last_logits
from kvmix_cli.decoding.prompt_scores import read_again
from kvmix_cli.errors import KvmixError
from kvmix_cli.models.loading import LoadedModel, load_model
from kvmix_cli.plan import LayerPlan, Plan
from kvmix_cli.plan.layers import HeadGroup
from kvmix_cli.plan.presets import plan_of
from kvmix_cli.plan.tokens import TokenShares
from kvmix_cli.texts import load_texts
from kvmix_cli.texts.tokens import cut_samples

KEPT = 0.5
PARTS = 4
"""Shares are whole quarters: with pages of 64, tokens are sorted in flushes of 256."""
PROMPTS, LENGTH = 6, 1536


@torch.inference_mode()
def head_scores(loaded: LoadedModel, plan: Plan, ids: list[int]) -> list[Tensor]:
    """Return KVzip's scores of a prompt, `[H_kv, T]` of every layer."""
    cache, rows = MixedCache.from_plan(plan, loaded.config), torch.tensor([ids], device=loaded.device)
    last_logits(loaded, cache, rows)
    read_again(loaded, cache, rows, lambda part: last_logits(loaded, cache, part))
    return [each.layer.held.scores[0] for each in cache.held if each.layer.held is not None]


def shares(scores: list[Tensor]) -> list[float]:
    """Return the share of its tokens that each KV head keeps, in `PARTS`, from its scores of several prompts."""
    kept = torch.zeros(scores[0].shape[0])
    for each in scores:
        best = torch.zeros(each.numel()).index_fill_(
            0, each.flatten().topk(int(KEPT * each.numel())).indices.cpu(), 1.0
        )
        kept += best.view(each.shape).mean(1) / len(scores)
    parts = (kept * PARTS).floor().clamp(1, PARTS - 1)
    while parts.sum() < round(KEPT * PARTS * len(parts)):
        parts[(kept * PARTS - parts).masked_fill(parts == PARTS - 1, -PARTS).argmax()] += 1
    return [float(part) / PARTS for part in parts]


def with_heads(layer: LayerPlan, kept: list[float]) -> LayerPlan:
    """Return a layer whose KV heads keep these shares; those that keep the same are one group."""
    heads = {share: [head for head, own in enumerate(kept) if own == share] for share in sorted({*kept} - {KEPT})}
    groups = [HeadGroup(heads=tuple(own), tokens=TokenShares(evict=1 - share)) for share, own in heads.items()]
    return layer.model_copy(update={"head_groups": tuple(groups)})


def main(model: str, out: Path) -> None:
    """Write the plan."""
    loaded = load_model(model)
    alike = plan_of("kvzip", loaded.info)
    tokens = alike.cache.tokens and alike.cache.tokens.model_copy(update={"flush": PARTS * alike.cache.page})
    cache = alike.cache.model_copy(update={"tokens": tokens})
    prompts = cut_samples(loaded.tokenizer, load_texts(), PROMPTS, LENGTH, 0, max_length=loaded.max_length)
    found = [head_scores(loaded, alike, list(ids)) for ids in prompts]
    by_layer = {index: shares(list(of)) for index, of in zip(alike.layers, zip(*found, strict=True), strict=True)}
    layers = {index: with_heads(layer, by_layer[index]) for index, layer in alike.layers.items()}
    plan = Plan.build(loaded.info, layers, cache)
    plan.save(out, f"python examples/head_budgets.py {model} {out.name}")
    for index, kept in by_layer.items():
        print(f"layer {index}: " + ", ".join(f"{share:.0%}" for share in kept))
    print(f"{plan.bits.nominal:.2f} nominal, {plan.bits.stored:.2f} stored bits")


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except KvmixError as error:
        sys.exit(str(error))
