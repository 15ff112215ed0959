"""Explanations of plans as tables, and as plain data for `--json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...allocation.explain import Reason, next_upgrade
from ...evaluation.results import Table
from ...studies.explain import Explanation
from .plans import loss_text, plan_title, summary, tensor_text


def explanation_table(found: Explanation, path: Path, context: int, batch: int) -> Table:
    """Return a table of a plan's widths with the reasons for them.

    Args:
        found: the explanation.
        path: file of the plan, for the footer.
        context, batch: tokens and sequences at which bytes are counted.
    """
    columns = ["bits", "score"] if found.prediction is None else ["bits", "score", "loss", "next"]
    footer = [*_footer(found), summary(found.plan, path, context, batch)]
    return Table(
        plan_title(found.plan),
        ["layer", *(f"{kind} {column}" for kind in "KV" for column in columns)],
        [[f"{keys.layer}", *_cells(keys, found), *_cells(values, found)] for keys, values in found.layers],
        "\n".join(footer),
    )


def explanation_json(found: Explanation) -> dict[str, Any]:
    """Return scores, predicted losses and upgrades as plain data."""
    first = next_upgrade(found.reasons)
    return {
        "profile": str(found.path),
        "score": found.importance,
        "predicted_by": found.prediction,
        "predicted_loss": found.loss,
        "next": first and {"index": first.layer, "tensor": first.kind[0], **_reason_json(first)},
        "layers": [{"index": k.layer, "k": _reason_json(k), "v": _reason_json(v)} for k, v in found.layers],
    }


def _cells(reason: Reason, found: Explanation) -> list[str]:
    cells = [tensor_text(reason.tensor), f"{reason.importance:.3g}"]
    if found.prediction is None:
        return cells
    loss = "-" if reason.loss is None else f"{reason.loss:.2g}"
    up = reason.upgrade
    upgrade = "" if up is None else f"{tensor_text(up.tensor)}: -{up.saves:.2g} for +{up.costs:.3g}"
    return [*cells, loss, upgrade]


def _footer(found: Explanation) -> list[str]:
    lines = [f"score:   {found.importance}, from {found.path}"]
    if found.loss is not None:
        lines.append(loss_text(found.loss, str(found.prediction)))
    first = next_upgrade(found.reasons)
    if first is not None and first.upgrade is not None:
        what = f"{tensor_text(first.upgrade.tensor)} bits for the {first.kind}s of layer {first.layer}"
        stored = found.plan.bits.stored + first.upgrade.costs
        lines.append(f"next:    nats saved for stored bits added; first of all {what}, {stored:.4g} stored bits then")
    return lines


def _reason_json(reason: Reason) -> dict[str, Any]:
    upgrade = reason.upgrade
    wider = upgrade and {
        **upgrade.tensor.model_dump(exclude_none=True),
        "saves": upgrade.saves,
        "costs": upgrade.costs,
    }
    own = reason.tensor.model_dump(exclude_none=True)
    return {**own, "score": reason.importance, "loss": reason.loss, "next": wider}
