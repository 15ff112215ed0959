"""Profiles and plans as tables, and as plain data for `--json`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from .. import console
from ..plan import CacheSettings, Plan, TensorPlan
from ..plan.sizes import format_bytes, mean_bits
from ..profile import Profile, Score, TensorScore, parse_choice
from .words import axes_lines


def score_json(score: Score) -> list[dict[str, Any]]:
    """Mean scores and their spread by layer, with curves and heads where the score has them."""
    return [
        {"index": index, **_score_json("k", layer.k), **_score_json("v", layer.v)}
        for index, layer in sorted(score.layers.items())
    ]


def _score_json(kind: str, tensor: TensorScore) -> dict[str, Any]:
    more = {f"{kind}_curve": tensor.curve, f"{kind}_heads": tensor.heads}
    return {kind: tensor.mean, f"{kind}_std": tensor.std, **{name: value for name, value in more.items() if value}}


def plan_json(plan: Plan, context: int, batch: int) -> dict[str, Any]:
    """Bits and layers of a plan, and its bytes at a context."""
    packed, full = _bytes(plan, context, batch)
    bits = {"nominal": plan.bits.nominal, "nominal_k": _nominal(plan, "key"), "nominal_v": _nominal(plan, "value")}
    return {
        "bits": {**bits, "stored": plan.bits.stored},
        "layers": [
            {"index": index, **_tensor_json("k", layer.k, plan), **_tensor_json("v", layer.v, plan)}
            for index, layer in sorted(plan.layers.items())
        ],
        "bytes": {"context": context, "batch": batch, "cache": packed, "bf16": full, "compression": full / packed},
    }


def _tensor_json(kind: str, tensor: TensorPlan, plan: Plan) -> dict[str, Any]:
    return {f"{kind}_bits": tensor.bits, f"{kind}_group_size": tensor.group_size or plan.cache.group_size}


def show_profile(profile: Profile, path: Path) -> None:
    """A table of every score: its curve, or else mean and spread with a bar."""
    for name, score in profile.scores.items():
        text = score.calibration
        footer = f"calibrated on {text.source}, {text.tokens} tokens, in {score.seconds:.1f} s\nprofile: {path}"
        title = f"{name} of {profile.model.id}"
        samples = f"over {text.samples} samples of {text.seq_len} tokens"
        if any(score.choices):
            columns, rows = _curve_table(score)
            console.table(f"{title} by bits, {score.unit}, mean {samples}", columns, rows, footer)
        else:
            rows = _mean_rows(score)
            console.table(f"{title}, mean and spread {samples}", ["layer", "K", "+-", "", "V", "+-", ""], rows, footer)


def _mean_rows(score: Score) -> list[list[Any]]:
    layers = sorted(score.layers.items())
    k_top, v_top = (max(getattr(layer, kind).mean for _, layer in layers) for kind in ("k", "v"))
    return [[index, *_cells(layer.k, k_top), *_cells(layer.v, v_top)] for index, layer in layers]


def _curve_table(score: Score) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: what every width costs, in the groups that plans have by default."""
    k, v = (_usual(choices) for choices in score.choices)
    rows = [
        [index, *(f"{layer.k.curve[key]:.2g}" for key in k), *(f"{layer.v.curve[key]:.2g}" for key in v)]
        for index, layer in sorted(score.layers.items())
    ]
    return ["layer", *(f"K {key}" for key in k), *(f"V {key}" for key in v)], rows


def _usual(choices: list[str]) -> list[str]:
    """Of every width the choice whose groups are nearest to those that plans have by default."""
    usual = CacheSettings.model_fields["group_size"].default

    def distance(key: str) -> float:
        size = parse_choice(key)[1]
        return math.inf if size == "row" else abs(size - usual)

    widths = dict.fromkeys(parse_choice(key)[0] for key in choices)
    return [min((key for key in choices if parse_choice(key)[0] == width), key=distance) for width in widths]


def show_plan(plan: Plan, path: Path, context: int, batch: int) -> None:
    """A table of a plan's widths, and what they amount to."""
    method = plan.provenance.get("method", "unknown method")
    rows = [
        [f"{first}-{last}" if last > first else f"{first}", last - first + 1, *map(tensor_text, (layer.k, layer.v))]
        for first, last, layer in plan.spans
    ]
    title = f"plan for {plan.model.id} by {method}"
    console.table(title, ["layers", "count", "K bits", "V bits"], rows, footer=summary(plan, path, context, batch))


def summary(plan: Plan, path: Path, context: int, batch: int) -> str:
    """What a plan's widths amount to, for the foot of a table."""
    packed, full = _bytes(plan, context, batch)
    nominal = f"{plan.bits.nominal:.4g} (K {_nominal(plan, 'key'):.4g}, V {_nominal(plan, 'value'):.4g})"
    size = f"{format_bytes(packed)} instead of {format_bytes(full)} in bf16: {full / packed:.2f}x smaller"
    sequences = "" if batch == 1 else f" x {batch} sequences"
    cache = plan.cache
    lines = [
        f"bits:    nominal {nominal}, stored {plan.bits.stored:.4g}",
        f"bytes:   {size}, at {context} tokens{sequences}",
        f"cache:   page {cache.page}, sink {cache.sink}, group {cache.group_size}, {cache.scale_dtype} scales, "
        f"window {cache.window.short}",
        *axes_lines(cache),
    ]
    if stock := len(plan.model.stock):
        lines.append(f"stock:   {stock} layers without full attention keep their own cache and are not counted")
    return "\n".join([*lines, f"plan:    {path}"])


def _bytes(plan: Plan, context: int, batch: int) -> tuple[int, int]:
    return plan.cache_bytes(context, batch).total, plan.unquantized_bytes(context, batch)


def _nominal(plan: Plan, kind: Literal["key", "value"]) -> float:
    return mean_bits(plan.layers, plan.cache, plan.model, "nominal", kind)


def notice_settings(name: str, score: Score, cache: CacheSettings) -> None:
    """Say so if a score was measured with other settings than a plan's."""
    from ..allocation import other_settings

    if differences := other_settings(score, cache):
        console.notice(f"{name} was measured with other settings than the plan's: {', '.join(differences)}")


def loss_text(loss: float, score: str) -> str:
    """A predicted loss, for the foot of a table."""
    return f"loss:    {loss:.5f} nats a token, {100 * math.expm1(loss):+.2f} % perplexity, as {score} predicts"


def tensor_text(tensor: TensorPlan) -> str:
    """`4`, or `4 (group 32)` for a tensor with a group size of its own."""
    return f"{tensor.bits}" if tensor.group_size is None else f"{tensor.bits} (group {tensor.group_size})"


def _cells(tensor: TensorScore, top: float) -> list[str]:
    return [f"{tensor.mean:.4g}", f"{tensor.std:.2g}", console.blocks(tensor.mean, top)]
