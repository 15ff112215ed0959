"""Profiles and plans as tables, and as plain data for `--json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from ...counting import counted
from ...evaluation.results import Table
from ...plan import AnyTensor, CacheSettings, Plan, TransformTensor
from ...plan.settings import Encode
from ...plan.sizes import format_bytes, mean_bits
from ...profile import Profile, Score, TensorScore, parse_choice
from ..words import axes_lines, blocks, heads_text, own_heads, own_tokens


class PlanBitsJson(TypedDict):
    """Mean bits of a plan; `nominal_k` and `nominal_v` are those of keys and of values."""

    nominal: float
    nominal_k: float
    nominal_v: float
    stored: float


class PlanBytesJson(TypedDict):
    """Bytes of a plan's cache at a context and batch, and of the same layers in bfloat16."""

    context: int
    batch: int
    cache: int
    bf16: int
    compression: float


class PlanJson(TypedDict):
    """Bits, layers and bytes of a plan as plain data."""

    bits: PlanBitsJson
    layers: list[dict[str, Any]]
    bytes: PlanBytesJson


def score_json(score: Score) -> list[dict[str, Any]]:
    """Return mean scores and their spread by layer, with curves and heads where the score has them."""
    return [
        {
            "index": index,
            **_tensor_score_json("k", layer.k),
            **_tensor_score_json("v", layer.v),
            **({"evict": {f"{share:g}": loss for share, loss in layer.evict.items()}} if layer.evict else {}),
        }
        for index, layer in sorted(score.layers.items())
    ]


def outliers_json(profile: Profile) -> dict[str, list[dict[str, float]]]:
    """Return how far channels and tokens stand out by layer, under `outliers`; empty if it was not measured."""
    found = sorted((profile.outliers or {}).items())
    return {"outliers": [{"index": index, **each.model_dump()} for index, each in found]} if found else {}


def plan_json(plan: Plan, context: int, batch: int) -> PlanJson:
    """Return the bits and layers of a plan, and its bytes at a context and batch."""
    packed, full = _bytes(plan, context, batch)
    return {
        "bits": {
            "nominal": plan.bits.nominal,
            "nominal_k": _nominal(plan, "key"),
            "nominal_v": _nominal(plan, "value"),
            "stored": plan.bits.stored,
        },
        "layers": [
            {
                "index": index,
                **_tensor_json("k", layer.k, plan.cache),
                **_tensor_json("v", layer.v, plan.cache),
                **({} if layer.tokens is None else {"tokens": layer.tokens.model_dump()}),
                **(
                    {}
                    if not layer.head_groups
                    else {"head_groups": [group.model_dump() for group in layer.head_groups]}
                ),
            }
            for index, layer in sorted(plan.layers.items())
        ],
        "bytes": {"context": context, "batch": batch, "cache": packed, "bf16": full, "compression": full / packed},
    }


def profile_tables(profile: Profile, path: Path, *, ascii_only: bool = False) -> list[Table]:
    """Return a table for every score: its curve, or else its mean and spread with a strip of blocks.

    Args:
        profile: the profile.
        path: file of the profile, for the footer.
        ascii_only: see `words.blocks`.
    """
    tables = []
    for name, score in profile.scores.items():
        text = score.calibration
        footer = f"calibrated on {text.source}, {text.tokens} tokens, in {score.seconds:.1f} s\nprofile: {path}"
        title = f"{name} of {profile.model.id}"
        samples = f"over {text.amount}"
        if any(score.choices):
            columns, rows = _curve_rows(score)
            tables.append(Table(f"{title} by bits, {score.unit}, mean {samples}", columns, rows, footer))
        else:
            columns, rows = ["layer", "K", "+-", "", "V", "+-", ""], _mean_rows(score, ascii_only)
            tables.append(Table(f"{title}, mean and spread {samples}", columns, rows, footer))
    return tables


MOST_NATS = 100
"""A larger loss in a file says nothing, and its exponential may be no number."""


def plan_table(plan: Plan, path: Path, context: int, batch: int, more: Sequence[str] = ()) -> Table:
    """Return a table of a plan's widths, with bits, bytes and cache settings in the footer.

    Args:
        plan: the plan.
        path: file of the plan, for the footer.
        context, batch: tokens and sequences at which bytes are counted.
        more: lines at the end of the footer.
    """
    rows = [
        [f"{a}-{b}" if b > a else f"{a}", f"{b - a + 1}", tensor_text(layer.k), tensor_text(layer.v)]
        for a, b, layer in plan.spans
    ]
    columns = ["layers", "count", "K bits", "V bits"]
    of_layers = [layer for _, _, layer in plan.spans]
    if any(layer.tokens for layer in of_layers):
        columns.append("tokens")
        rows = [[*row, own_tokens(layer.tokens)] for row, layer in zip(rows, of_layers, strict=True)]
    if any(layer.head_groups for layer in of_layers):
        columns.append("heads of their own")
        rows = [[*row, own_heads(layer.head_groups)] for row, layer in zip(rows, of_layers, strict=True)]
    footer = "\n".join([summary(plan, path, context, batch), *more])
    return Table(plan_title(plan), columns, rows, footer)


def plan_title(plan: Plan) -> str:
    """Return the title of a table of a plan."""
    return f"plan for {plan.model.id} by {plan.provenance.get('method', 'unknown method')}"


def summary(plan: Plan, path: Path, context: int, batch: int) -> str:
    """Return the bits, bytes and cache settings of a plan as lines for the footer of a table."""
    packed, full = _bytes(plan, context, batch)
    nominal = f"{plan.bits.nominal:.4g} (K {_nominal(plan, 'key'):.4g}, V {_nominal(plan, 'value'):.4g})"
    size = f"{format_bytes(packed)} instead of {format_bytes(full)} in bf16: {full / packed:.2f}x smaller"
    sequences = "" if batch == 1 else f" x {batch} sequences"
    cache = plan.cache
    lines = [
        f"bits:    nominal {nominal}, stored {plan.bits.stored:.4g}",
        f"bytes:   {size}, at {counted(context, 'token')}{sequences}",
        f"cache:   page {cache.page}, sink {cache.sink}, group {cache.group_size}, {cache.scale_dtype} scales, "
        f"window {cache.window.short}" + ("" if cache.encode == "minmax" else f", {encode_text(cache.encode)}"),
        *axes_lines(cache),
    ]
    if len(plan.model.geometries) > 1 or plan.model.value_dim is not None:
        lines.append(f"heads:   {heads_text(plan.model)}")
    if stock := len(plan.model.stock):
        lines.append(f"stock:   not counted are the own caches of {counted(stock, 'layer')} without full attention")
    return "\n".join([*lines, f"plan:    {path}"])


def encode_text(encode: Encode) -> str:
    """Return a cache's encoder in words."""
    return "encode fitted (K refit, V search)" if encode == "fitted" else f"encode {encode}"


def loss_text(loss: float, score: str, context: int | None = None) -> str:
    """Return a predicted loss as a line for the footer of a table; `context` is the tokens that it is predicted for."""
    where = "" if context is None else f" in contexts of {context} tokens"
    return f"loss:    {loss:.5f} nats a token, {100 * math.expm1(loss):+.2f} % perplexity, as {score} predicts{where}"


def stated_loss(plan: Plan) -> list[str]:
    """Return the loss that was predicted when a plan was made, as a line for the footer of a table, if it is stated."""
    loss, score = plan.provenance.get("predicted_loss"), plan.provenance.get("score")
    if not isinstance(loss, float) or not isinstance(score, str) or not abs(loss) < MOST_NATS:
        return []
    context = plan.provenance.get("predicted_context")
    return [loss_text(loss, score, context if isinstance(context, int) else None)]


def tensor_text(tensor: AnyTensor) -> str:
    """Return `4`, `4 (group 32, refit)` for a tensor with its own group size or encoder, or `2.25 (transform 0-6)`."""
    if isinstance(tensor, TransformTensor):
        digits = sorted("".join(tensor.widths))
        return f"{tensor.mean_width:.3g} (transform {digits[0]}-{digits[-1]})"
    own = [] if tensor.group_size is None else [f"group {tensor.group_size}"]
    own += [] if tensor.encode is None else [tensor.encode]
    return f"{tensor.bits} ({', '.join(own)})" if own else f"{tensor.bits}"


def _tensor_json(name: str, tensor: AnyTensor, cache: CacheSettings) -> dict[str, float | str | list[str]]:
    """Return a tensor's bits and group size; of transform codes the mean bits and the widths of each KV head."""
    if isinstance(tensor, TransformTensor):
        return {f"{name}_bits": tensor.mean_width, f"{name}_codec": "transform", f"{name}_widths": list(tensor.widths)}
    return {f"{name}_bits": tensor.bits, f"{name}_group_size": tensor.group_size or cache.group_size}


def _tensor_score_json(kind: str, tensor: TensorScore) -> dict[str, Any]:
    more = {f"{kind}_curve": tensor.curve, f"{kind}_heads": tensor.heads}
    return {kind: tensor.mean, f"{kind}_std": tensor.std, **{name: value for name, value in more.items() if value}}


def _mean_rows(score: Score, ascii_only: bool) -> list[list[str]]:
    layers = sorted(score.layers.items())
    k_top, v_top = (max(getattr(layer, kind).mean for _, layer in layers) for kind in ("k", "v"))

    def cells(tensor: TensorScore, top: float) -> list[str]:
        spread = f"{tensor.std:.2g}" if score.calibration.samples > 1 else "-"  # one sample has no spread
        return [f"{tensor.mean:.4g}", spread, blocks(tensor.mean, top, ascii_only=ascii_only)]

    return [[f"{index}", *cells(layer.k, k_top), *cells(layer.v, v_top)] for index, layer in layers]


def _curve_rows(score: Score) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: the loss at every width, in the groups that plans have by default."""
    k, v = (_usual(choices) for choices in score.choices)
    shares = sorted({share for layer in score.layers.values() for share in layer.evict})
    rows = []
    for index, layer in sorted(score.layers.items()):
        losses = [*(layer.k.curve[key] for key in k), *(layer.v.curve[key] for key in v)]
        losses += [layer.evict.get(share, math.nan) for share in shares]
        rows.append([f"{index}", *(f"{loss:.2g}" for loss in losses)])
    columns = [
        *(f"K {key}" for key in k),
        *(f"V {key}" for key in v),
        *(f"evict {100 * share:g} %" for share in shares),
    ]
    return ["layer", *columns], rows


def _usual(choices: list[str]) -> list[str]:
    """Return for every width the choice whose groups are nearest to those that plans have by default."""
    usual = CacheSettings.model_fields["group_size"].default

    def distance(key: str) -> float:
        size = parse_choice(key)[1]
        return math.inf if size == "row" else abs(size - usual)

    widths = dict.fromkeys(parse_choice(key)[0] for key in choices)
    return [min((key for key in choices if parse_choice(key)[0] == width), key=distance) for width in widths]


def _bytes(plan: Plan, context: int, batch: int) -> tuple[int, int]:
    return plan.cache_bytes(context, batch).total, plan.unquantized_bytes(context, batch)


def _nominal(plan: Plan, kind: Literal["key", "value"]) -> float:
    return mean_bits(plan.layers, plan.cache, plan.model, "nominal", kind)
