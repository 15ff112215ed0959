"""Profiles and plans as tables, and as plain data for `--json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from .. import budget, console
from ..plan import Plan, TensorPlan
from ..profile import Profile, Score


def score_json(score: Score) -> list[dict[str, float]]:
    """Mean scores and their spread by layer."""
    return [
        {"index": index, "k": layer.k.mean, "v": layer.v.mean, "k_std": layer.k.std, "v_std": layer.v.std}
        for index, layer in sorted(score.layers.items())
    ]


def plan_json(plan: Plan, context: int, batch: int) -> dict[str, Any]:
    """Bits and layers of a plan, and its bytes at a context."""
    packed, full = _bytes(plan, context, batch)
    bits = {"nominal": plan.bits.nominal, "nominal_k": _nominal(plan, "key"), "nominal_v": _nominal(plan, "value")}
    return {
        "bits": {**bits, "stored": plan.bits.stored},
        "layers": [
            {"index": index, "k_bits": layer.k.bits, "v_bits": layer.v.bits}
            for index, layer in sorted(plan.layers.items())
        ],
        "bytes": {"context": context, "batch": batch, "cache": packed, "bf16": full, "compression": full / packed},
    }


def show_profile(profile: Profile, path: Path) -> None:
    """A table of every score: mean and spread by layer, with a bar."""
    text = profile.calibration
    for name, score in profile.scores.items():
        k_top = max(layer.k.mean for layer in score.layers.values())
        v_top = max(layer.v.mean for layer in score.layers.values())
        rows = [
            [index, *_cells(layer.k.mean, layer.k.std, k_top), *_cells(layer.v.mean, layer.v.std, v_top)]
            for index, layer in sorted(score.layers.items())
        ]
        console.table(
            f"{name} of {profile.model.id}, mean and spread over {text.samples} samples of {text.seq_len} tokens",
            ["layer", "K", "+-", "", "V", "+-", ""],
            rows,
            footer=f"calibrated on {text.source}, {text.tokens} tokens, in {score.seconds:.1f} s\nprofile: {path}",
        )


def show_plan(plan: Plan, path: Path, context: int, batch: int) -> None:
    """A table of a plan's widths, and what they amount to."""
    method = plan.provenance.get("method", "unknown method")
    rows = [
        [f"{first}-{last}" if last > first else f"{first}", last - first + 1, _widths(layer.k), _widths(layer.v)]
        for first, last, layer in plan.runs
    ]
    title = f"plan for {plan.model.id} by {method}"
    console.table(title, ["layers", "count", "K bits", "V bits"], rows, footer=_summary(plan, path, context, batch))


def _summary(plan: Plan, path: Path, context: int, batch: int) -> str:
    packed, full = _bytes(plan, context, batch)
    nominal = f"{plan.bits.nominal:.4g} (K {_nominal(plan, 'key'):.4g}, V {_nominal(plan, 'value'):.4g})"
    size = f"{budget.format_bytes(packed)} instead of {budget.format_bytes(full)} in bf16: {full / packed:.2f}x smaller"
    sequences = "" if batch == 1 else f" x {batch} sequences"
    cache = plan.cache
    lines = [
        f"bits:    nominal {nominal}, stored {plan.bits.stored:.4g}",
        f"bytes:   {size}, at {context} tokens{sequences}",
        f"cache:   page {cache.page}, sink {cache.sink}, group {cache.group_size}, {cache.scale_dtype} scales, "
        f"window {cache.window.short}",
    ]
    if stock := len(plan.model.stock):
        lines.append(f"stock:   {stock} layers without full attention keep their own cache and are not counted")
    return "\n".join([*lines, f"plan:    {path}"])


def _bytes(plan: Plan, context: int, batch: int) -> tuple[int, int]:
    return budget.cache_bytes(plan, context, batch).total, budget.full_precision_bytes(plan, context, batch)


def _nominal(plan: Plan, kind: Literal["key", "value"]) -> float:
    return budget.mean_bits(plan.layers, plan.cache, plan.model, "nominal", kind)


def _widths(tensor: TensorPlan) -> str:
    return f"{tensor.bits}" if tensor.group_size is None else f"{tensor.bits} (group {tensor.group_size})"


def _cells(mean: float, std: float, top: float) -> list[str]:
    return [f"{mean:.4g}", f"{std:.2g}", console.blocks(mean, top)]
