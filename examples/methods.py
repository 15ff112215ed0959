"""Plans of every method at 2.5, 3 and 4 stored bits, for heads of 64, to be measured side by side: see docs/methods.md.

    python examples/methods.py builtin:tiny plans/

A method is given the most that fits a budget. What is searched over is the layer's own bits; shares and widths of tiers
and runs are those of the table below.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from kvmix_cli.errors import KvmixError
from kvmix_cli.models.loading import load_info
from kvmix_cli.plan import CacheSettings, ModelInfo, Plan
from kvmix_cli.plan.channels import ChannelGroup, ChannelPolicy
from kvmix_cli.plan.presets.scaling import SLACK
from kvmix_cli.plan.tokens import Tier, TokenPolicy
from kvmix_cli.plan.transforms import Balance, Rotate, Transforms

BUDGETS = (2.5, 3.0, 4.0)
UNIFORM = [(k, v) for k in (8, 4, 3, 2, 1) for v in (8, 4, 3, 2, 1) if v <= k <= 2 * v]
"""Keys and values of all layers, the widest first once they are sorted."""
ROTATED = Transforms(k=(Rotate(),))
WINDOW = {"page": 64, "sink": 4, "group_size": 64, "window": {"kind": "recent", "tokens": 64}}


def tiers(score: str, share: float, bits: int, evict: float = 0.0, flush: int = 320) -> TokenPolicy:
    """Return one tier of so many bits, or eviction with none."""
    return TokenPolicy(
        score=score, tiers=(Tier(share=share, k=bits, v=bits),) if share else (), evict=evict, flush=flush
    )


def runs(score: str, *bits: int) -> ChannelPolicy:
    """Return runs of 16 key channels each."""
    return ChannelPolicy(score=score, runs=tuple(ChannelGroup(channels=16, bits=each) for each in bits), refresh=0)


METHODS: dict[str, dict[float, dict[str, Any]]] = {
    "uniform": {budget: {} for budget in BUDGETS},
    "fitted": {budget: {"encode": "fitted"} for budget in BUDGETS},
    "rotate-k": {budget: {"transforms": ROTATED} for budget in BUDGETS},
    "rotate-kv": {budget: {"transforms": Transforms(k=(Rotate(),), v=(Rotate(),))} for budget in BUDGETS},
    "mikv": {
        2.5: {"tokens": tiers("attention", 0.2, 3), "transforms": Transforms(k=(Balance(),))},
        3.0: {"tokens": tiers("attention", 0.2, 4), "transforms": Transforms(k=(Balance(),))},
        4.0: {"tokens": tiers("attention", 0.2, 8), "transforms": Transforms(k=(Balance(),))},
    },
    "mikv-rotate-k": {
        2.5: {"tokens": tiers("attention", 0.2, 3), "transforms": ROTATED},
        3.0: {"tokens": tiers("attention", 0.2, 4), "transforms": ROTATED},
        4.0: {"tokens": tiers("attention", 0.2, 8), "transforms": ROTATED},
    },
    "recency": {
        2.5: {"tokens": tiers("recency", 0.2, 3)},
        3.0: {"tokens": tiers("recency", 0.2, 4)},
        4.0: {"tokens": tiers("recency", 0.2, 8)},
    },
    "zipcache": {
        2.5: {"tokens": tiers("normalised", 0.2, 3), "transforms": Transforms(v=(Balance(),))},
        3.0: {"tokens": tiers("normalised", 0.2, 4), "transforms": Transforms(v=(Balance(),))},
        4.0: {"tokens": tiers("normalised", 0.6, 4), "transforms": Transforms(v=(Balance(),))},
    },
    "h2o": {
        2.5: {"tokens": tiers("attention", 0, 16, evict=0.85), "page": 16},
        3.0: {"tokens": tiers("attention", 0, 16, evict=0.825, flush=640), "page": 16},
        4.0: {"tokens": tiers("attention", 0, 16, evict=0.775, flush=640), "page": 16},
    },
    "evict-4bit": {
        2.5: {"tokens": tiers("attention", 0, 16, evict=0.5, flush=640)},
        3.0: {"tokens": tiers("attention", 0, 16, evict=0.4)},
        4.0: {"tokens": tiers("attention", 0, 16, evict=0.2)},
    },
    "mixkvq": {
        2.5: {"channels": runs("query-range", 3), "page": 128, "group_size": 128},
        3.0: {"channels": runs("query-range", 4, 4)},
        4.0: {"channels": runs("query-range", 8, 8)},
    },
    "range": {
        2.5: {"channels": runs("range", 3), "page": 128, "group_size": 128},
        3.0: {"channels": runs("range", 4, 4)},
        4.0: {"channels": runs("range", 8, 8)},
    },
    "kitty": {
        2.5: {"channels": runs("magnitude", 3), "page": 128, "group_size": 128},
        3.0: {"channels": runs("magnitude", 4, 4)},
        4.0: {"channels": runs("magnitude", 8, 8)},
    },
}
HALVES = {
    **{
        score: {"score": score}
        for score in (
            "attention",
            "balancekv",
            "bumblebee",
            "expected-attention",
            "key-norm",
            "keydiff",
            "kvcrush",
            "kvzip",
            "leverage",
            "morphkv",
            "random",
            "snapkv",
            "subgen",
            "tova",
        )
    },
    **{f"{score}-16": {"score": score, "granularity": 16} for score in ("attention", "kvzip", "leverage", "snapkv")},
}
"""Scores by which half of the tokens are evicted; the others have 4 bits. In chunks of 16 tokens, some of them."""
OF_ONE_WIDTH = {"h2o": (16, 16), "evict-4bit": (4, 4)}
LAYERED = {
    "layers": {},
    "layers-rotate-k": {"transforms": ROTATED},
    "layers-mikv-rotate-k": {"tokens": tiers("attention", 0.2, 4, flush=640), "transforms": ROTATED},
    "layers-mixkvq": {"channels": runs("query-range", 4)},
    "layers-kitty": {"channels": runs("magnitude", 4)},
}
"""Axes for plans that `kvmix allocate` makes of the profile, in pages of 128 and groups of 64, 32 or 128."""
LAYER_OPTIONS = ("--method", "ilp", "--group-size", "64,32,128")


def widest(info: ModelInfo, budget: float, axes: dict[str, Any], widths: list[tuple[int, int]]) -> Plan | None:
    """Return the uniform plan with these axes and the most bits within a budget; None if there is none."""
    cache = CacheSettings.model_validate({**CacheSettings.model_validate(WINDOW).model_dump(), **axes}, strict=False)
    plans = [Plan.uniform(info, k, v, cache) for k, v in widths]
    return max((plan for plan in plans if plan.bits.stored <= budget + SLACK), key=_bits, default=None)


def half(info: ModelInfo, policy: dict[str, Any]) -> Plan:
    """Return the plan that evicts half of the tokens by a score."""
    tokens = TokenPolicy.model_validate({**policy, "evict": 0.5, "flush": 128}, strict=False)
    return Plan.uniform(
        info, 4, 4, CacheSettings.model_validate({**WINDOW, "tokens": tokens.model_dump()}, strict=False)
    )


def layered(info: ModelInfo, budget: float, axes: dict[str, Any], folder: Path) -> Plan | None:
    """Return the most that `kvmix allocate` can spend on layers for the whole to fit."""
    for twentieths in range(round(budget * 20), 46, -1):
        plan = allocated(info, twentieths / 20, folder / f"{twentieths / 20:g}.yaml", *LAYER_OPTIONS)
        if plan is not None:
            cache = plan.cache.model_copy(update=axes)
            whole = Plan.build(info, plan.layers, cache, plan.provenance)
            if whole.bits.stored <= budget + SLACK:
                return whole
    return None


def allocated(info: ModelInfo, stored: float, path: Path, *options: str) -> Plan | None:
    """Return the plan of `kvmix allocate` with at most so many stored bits, in a file; None if there is none."""
    if not path.exists():
        command = [str(Path(sys.executable).with_name("kvmix")), "allocate", "--model", info.id]
        command += ["--stored-bits", f"{stored:g}", *options, "--page", "128", "--window", "recent:64"]
        if subprocess.run([*command, "--out", str(path), "-q"], check=False, capture_output=True).returncode:
            return None
    return Plan.load(path)


def _bits(plan: Plan) -> float:
    return plan.bits.stored


def main(model: str, out: Path) -> None:
    """Write the plans."""
    info = load_info(model)
    for name, policy in HALVES.items():
        half(info, policy).save(out / f"half-{name}.yaml", f"python examples/methods.py {model} {out.name}")
    for budget in BUDGETS:
        found = {name: widest(info, budget, of[budget], _widths(name)) for name, of in METHODS.items()}
        found |= {name: layered(info, budget, axes, out / "layers") for name, axes in LAYERED.items()}
        found["transform"] = allocated(info, budget, out / f"transform-{budget:g}.yaml", "--method", "transform")
        for name, plan in found.items():
            print(f"{budget:g} {name}: " + (f"{plan.short}, {plan.bits.stored:.3f} stored" if plan else "nothing fits"))
            if plan is not None and name != "transform":
                plan.save(out / f"{name}-{budget:g}.yaml", f"python examples/methods.py {model} {out.name}")


def _widths(method: str) -> list[tuple[int, int]]:
    return [OF_ONE_WIDTH[method]] if method in OF_ONE_WIDTH else UNIFORM


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except KvmixError as error:
        sys.exit(str(error))
