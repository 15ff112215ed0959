"""Saying which layers another engine has no way to express, and why."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import ExportError
from ..plan import Plan
from ..plan.geometry import format_ranges


def refuse(engine: str, rule: str, layers: Mapping[int, str], remedy: str) -> None:
    """Raise ExportError if there is any layer that breaks the engine's rule.

    Args:
        layers: what is wrong with each.
        remedy: options of `kvmix allocate` that make a plan which the engine can express.
    """
    if not layers:
        return
    alike: dict[str, list[int]] = {}
    for layer, what in sorted(layers.items()):
        alike.setdefault(what, []).append(layer)
    found = ", ".join(f"{what} in layers {format_ranges(indices)}" for what, indices in alike.items())
    raise ExportError(f"{engine} cannot express this plan: {rule}, but the plan has {found}; allocate with {remedy}")


def refuse_axes(engine: str, plan: Plan) -> None:
    """Raise ExportError if a plan does more than choose widths."""
    if axes := plan.cache.axes:
        raise ExportError(
            f"{engine} cannot express this plan: it knows widths, but not {' and '.join(axes)} of the plan's cache; "
            "allocate without --with"
        )
