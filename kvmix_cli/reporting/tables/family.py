"""A family of plans, one for each step of the budget, as a table and as plain data for `--json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...counting import counted
from ...evaluation.results import Table
from ...plan import Plan
from .plans import plan_json


def member_name(plan: Plan, family: str, options: str = "") -> str:
    """Return the name of a plan of a family, `pareto-2.5`: the family's name and the budget in stored bits.

    Args:
        options: hash of the options that set the family apart, which the name then ends in: `pareto-2.5-1f3a5c`.
    """
    return "-".join(filter(None, (family, f"{plan.provenance['budget']['stored_bits']:g}", options)))


def family_table(named: Sequence[tuple[Path, Plan]]) -> Table:
    """Return a table of the plans of a family, each with its file."""
    first_path, first = named[0]
    rows = []
    for path, plan in named:
        loss = plan.provenance.get("predicted_loss")
        losses = ["-", "-"] if loss is None else [f"{loss:.5f}", f"{100 * math.expm1(loss):+.2f} %"]
        rows.append([path.stem, f"{plan.bits.stored:.4g}", f"{plan.bits.nominal:.4g}", *losses])
    return Table(
        f"{counted(len(named), 'plan')} for {first.model.id} by {first.provenance['score']}",
        ["plan", "stored", "nominal", "loss", "perplexity"],
        rows,
        f"loss is predicted, in nats a token\nplans:   {first_path.parent}",
    )


def family_json(named: Sequence[tuple[Path, Plan]], context: int, batch: int) -> dict[str, Any]:
    """Return the plans of a family as plain data; bytes are counted at a context and batch."""
    _, first = named[0]
    plans = [
        {
            "plan": str(path),
            "predicted_loss": plan.provenance.get("predicted_loss"),
            **plan_json(plan, context, batch),
        }
        for path, plan in named
    ]
    return {"model": first.model.id, "method": "pareto", "score": first.provenance["score"], "plans": plans}
