"""What `kvmix allocate --method pareto` writes and shows: one plan file for each step of the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import console, state

if TYPE_CHECKING:
    from ..plan import Plan


def save_family(plans: Sequence[Plan], name: str, command: str, context: int, batch: int) -> None:
    """Write the plans as `<name>-<stored bits>.yaml`, each whole or not at all, and show them. Raises OutputError."""
    from .tables import plan_json

    named = [(_path(plan, name).stem, plan.save(_path(plan, name), command), plan) for plan in plans]
    model, score = plans[0].model, plans[0].provenance["score"]
    console.table(
        f"{len(plans)} plans for {model.id} by {score}",
        ["plan", "stored", "nominal", "loss", "perplexity"],
        [[stem, f"{plan.bits.stored:.4g}", f"{plan.bits.nominal:.4g}", *_loss(plan)] for stem, _, plan in named],
        footer=f"loss is predicted, in nats a token\nplans:   {_path(plans[0], name).parent}",
    )
    rows = [
        {"plan": path, "predicted_loss": plan.provenance.get("predicted_loss"), **plan_json(plan, context, batch)}
        for _, path, plan in named
    ]
    console.emit_json({"command": "allocate", "model": model.id, "method": "pareto", "score": score, "plans": rows})


def _path(plan: Plan, name: str) -> Path:
    return state.plan_path(plan.model.id, f"{name}-{plan.provenance['budget']['stored_bits']:g}")


def _loss(plan: Plan) -> list[Any]:
    loss = plan.provenance.get("predicted_loss")
    return ["-", "-"] if loss is None else [f"{loss:.5f}", f"{100 * math.expm1(loss):+.2f} %"]
