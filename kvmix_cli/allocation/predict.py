"""What a score says about a finished plan."""

from __future__ import annotations

from ..plan import CacheSettings, Plan
from ..profile import Score
from .curves import Curves


def predicted_loss(plan: Plan, score: Score) -> float | None:
    """Increase of the mean loss a token, in nats: the sum of the cleaned curves (`curves.py`) at the plan's choices.

    None if the score does not predict loss, is of another model, or has no value for one of the choices.
    """
    if not score.predicts_loss or score.layers.keys() != plan.layers.keys():
        return None
    return Curves(score, plan.model, plan.cache).total(plan.layers)


def other_settings(score: Score, cache: CacheSettings) -> list[str]:
    """How the cache differs from the one that the curves were measured with, e.g. `page 128 instead of 32`."""
    cut = [
        f"{name} {getattr(cache, name)} instead of {measured}"
        for name, measured in score.setup.items()
        if name in ("page", "scale_dtype") and getattr(cache, name) != measured
    ]
    return cut + [f"{name}, which it knows nothing of" for name in cache.axes]
