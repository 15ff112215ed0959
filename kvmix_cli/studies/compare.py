"""Differences between two plans, and between two profiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import correlation
from typing import Any, Literal

from ..errors import KvmixError
from ..plan import LayerPlan, Plan
from ..plan.document.strict_yaml import StrictModel
from ..profile import Profile, Score

Pair = tuple[Any, Any]
"""The same thing of the first and of the second."""


@dataclass(frozen=True)
class PlanDifference:
    """Differences between two plans.

    Attributes:
        layers: number of layers that either plan has.
        changed: storage of each layer that differs, by index; None for a plan without this layer.
        settings: cache settings and facts of the model that differ, such as `cache.page`.
        bits: nominal and stored bits.
    """

    layers: int
    changed: Mapping[int, tuple[LayerPlan | None, LayerPlan | None]]
    settings: Mapping[str, Pair]
    bits: Mapping[str, tuple[float, float]]

    @property
    def same(self) -> bool:
        """Return whether the plans make the same decisions."""
        return not self.changed and not self.settings


@dataclass(frozen=True)
class Ranking:
    """Places of the layers in the order of importance, 1 for the most important, by index.

    Attributes:
        correlation: Spearman's rank correlation of the two; 1 for a single layer.
    """

    first: Mapping[int, int]
    second: Mapping[int, int]
    correlation: float


@dataclass(frozen=True)
class ProfileDifference:
    """Rankings of the layers by two profiles.

    Attributes:
        same: True if all scores that both have are equal.
        rankings: rankings by keys and by values, by the name of the score.
    """

    same: bool
    rankings: Mapping[str, tuple[Ranking, Ranking]]


def compare_plans(first: Plan, second: Plan) -> PlanDifference:
    """Compare the layers, settings and bits of two plans."""
    layers = sorted(first.layers.keys() | second.layers.keys())
    pairs = {index: (first.layers.get(index), second.layers.get(index)) for index in layers}
    return PlanDifference(
        layers=len(layers),
        changed={index: pair for index, pair in pairs.items() if pair[0] != pair[1]},
        settings={
            **_changed_fields("cache", first.cache, second.cache),
            **_changed_fields("model", first.model, second.model),
        },
        bits={
            "nominal": (first.bits.nominal, second.bits.nominal),
            "stored": (first.bits.stored, second.bits.stored),
        },
    )


def compare_profiles(
    first: Profile, second: Profile, names: tuple[object, object] = ("first", "second")
) -> ProfileDifference:
    """Compare the rankings of the layers by every score that both profiles have.

    Raises:
        KvmixError: if they share no score, or their models have different layers; it has these `names`.
    """
    shared = [name for name in first.scores if name in second.scores]
    if not shared or first.model.quantizable != second.model.quantizable:
        what = "their models have different layers" if shared else "they share no score"
        raise KvmixError(f"{names[0]} and {names[1]} cannot be compared: {what}")
    pairs = {name: (first.scores[name], second.scores[name]) for name in shared}
    return ProfileDifference(
        same=all(one.layers == other.layers for one, other in pairs.values()),
        rankings={name: (_ranking(*pair, "k"), _ranking(*pair, "v")) for name, pair in pairs.items()},
    )


def _changed_fields(name: str, first: StrictModel, second: StrictModel) -> dict[str, Pair]:
    pairs = {f"{name}.{each}": (getattr(first, each), getattr(second, each)) for each in type(first).model_fields}
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def _ranking(first: Score, second: Score, kind: Literal["k", "v"]) -> Ranking:
    one, other = _places(first, kind), _places(second, kind)
    layers = sorted(one)
    agreement = correlation([one[n] for n in layers], [other[n] for n in layers]) if len(layers) > 1 else 1.0
    return Ranking(one, other, agreement)


def _places(score: Score, kind: Literal["k", "v"]) -> dict[int, int]:
    """Return the place of each layer; ties go to the earlier layer, as with the rank method."""
    order = sorted(score.layers, key=lambda layer: (-getattr(score.layers[layer], kind).mean, layer))
    return {layer: place for place, layer in enumerate(order, start=1)}
