"""What transforms, tiers and channel runs cost a whole model on a CPU: a prompt, and steps of decoding after it.

    python kernels/bench/bench_composed_cpu.py [--contexts 1024,4096] [--model builtin:tiny] [--rounds 9] [--save]

Every candidate stores 2 bits in pages of 64, and what its name says. They take turns with the same tokens. `ratio` is
the plain 2-bit cache's time over the candidate's: what is below 1 is what the method costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import results
import torch

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.models.loading import LoadedModel, load_model
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.channels import ChannelGroup, ChannelPolicy
from kvmix_cli.plan.tokens import Tier, TokenPolicy
from kvmix_cli.plan.transforms import Balance, Rotate, Transforms

STEPS = 16
TIER = (Tier(share=0.2, k=8, v=8),)
RUNS = (ChannelGroup(channels=16, bits=8), ChannelGroup(channels=16, bits=4))
AXES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotated": {"transforms": Transforms(k=(Rotate(),), v=(Rotate(),))},
    "balanced": {"transforms": Transforms(k=(Balance(),), v=(Balance(),))},
    "tiers by recency": {"tokens": TokenPolicy(score="recency", tiers=TIER)},
    "tiers by attention": {"tokens": TokenPolicy(score="attention", tiers=TIER)},
    "tiers by normalised attention": {"tokens": TokenPolicy(score="normalised", tiers=TIER)},
    "evicted by attention": {"tokens": TokenPolicy(score="attention", evict=0.6)},
    "runs by magnitude": {"channels": ChannelPolicy(score="magnitude", runs=RUNS)},
    "runs by queries": {"channels": ChannelPolicy(score="query-range", runs=RUNS)},
}


def measure(loaded: LoadedModel, context: int, rounds: int) -> list[dict[str, object]]:
    """One row a candidate and kind of work."""
    tokens = torch.randint(5, loaded.model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    caches: dict[str, MixedCache] = {}

    def prompt(name: str, plan: Plan) -> None:
        caches[name] = MixedCache.from_plan(plan, loaded.model.config, reserve=context + STEPS * (rounds + 2))
        loaded.model(tokens, past_key_values=caches[name], logits_to_keep=1)

    def decode(name: str) -> None:
        for _ in range(STEPS):
            loaded.model(tokens[:, :1], past_key_values=caches[name], logits_to_keep=1)

    plans = {
        name: Plan.uniform(loaded.info, 2, 2, CacheSettings(page=64, group_size=64, **axes))
        for name, axes in AXES.items()
    }
    work: dict[str, dict[str, Callable[[], object]]] = {
        "prompt": {name: lambda name=name, plan=plan: prompt(name, plan) for name, plan in plans.items()},
        "decode": {name: lambda name=name: decode(name) for name in plans},
    }
    rows = []
    for kind, candidates in work.items():
        times = results.in_turns(candidates, rounds)
        print(f"\n{kind}, context {context}, {torch.get_num_threads()} threads")
        for name, ms in times.items():
            each, ratio = ms / (STEPS if kind == "decode" else 1), times["plain"] / ms
            print(f"  {name:30} {each:9.2f} ms  {ratio:5.2f}x")
            row = {"op": f"composed {kind}", "shape": loaded.info.id, "context": context, "name": name}
            rows.append({**row, "ms": round(each, 3), "ratio": round(ratio, 3)})
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--contexts", default="1024,2048,4000")
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    loaded = load_model(options.model, dtype=options.dtype)
    rows = [row for each in options.contexts.split(",") for row in measure(loaded, int(each), options.rounds)]
    if options.save:
        results.append(rows)


if __name__ == "__main__":
    main()
