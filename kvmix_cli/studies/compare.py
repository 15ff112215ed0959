"""How two plans, or two profiles, differ: shown as tables and given as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import correlation
from typing import Any, Literal

from .. import console
from ..errors import KvmixError
from ..plan import LayerPlan, Plan
from ..plan.settings import AXES
from ..profile import Profile, Score
from ..reporting.words import in_words

_AXES = [f"cache.{name}" for name in AXES]


def compare_plans(paths: Sequence[Path], first: Plan, second: Plan) -> dict[str, Any]:
    """Show what differs: widths by layer, bits, and every other setting."""
    layers = sorted(first.layers.keys() | second.layers.keys())
    changed = [index for index in layers if first.layers.get(index) != second.layers.get(index)]
    widths = [[_widths(plan.layers.get(index)) for plan in (first, second)] for index in changed]
    settings = _changed_settings(first, second)
    bits = {name: [getattr(plan.bits, name) for plan in (first, second)] for name in ("nominal", "stored")}
    footer = [f"{name}: {old} -> {new}" for name, (old, new) in settings.items()]
    footer += [f"{name} bits: {old:.4g} -> {new:.4g}" for name, (old, new) in bits.items()]
    footer += [f"{len(changed)} of {len(layers)} layers differ"]
    rows = [[index, *pair] for index, pair in zip(changed, widths, strict=True)]
    console.table(_title(paths), ["layer", "first", "second"], rows, "\n".join(footer))
    return {
        "same": not changed and not settings,
        "layers": [{"index": index, "widths": pair} for index, pair in zip(changed, widths, strict=True)],
        "settings": settings,
        "bits": bits,
    }


def compare_profiles(paths: Sequence[Path], first: Profile, second: Profile) -> dict[str, Any]:
    """Show, for every score that both have, the place of each layer in either ranking, and how far they agree.

    Raises:
        KvmixError: if they share no score, or their models have other layers.
    """
    shared = [name for name in first.scores if name in second.scores]
    if not shared or first.model.quantizable != second.model.quantizable:
        what = "their models have different layers" if shared else "they share no score"
        raise KvmixError(f"{paths[0]} and {paths[1]} cannot be compared: {what}")
    scores = {name: _compare_scores(name, paths, first.scores[name], second.scores[name]) for name in shared}
    return {"same": all(first.scores[name].layers == second.scores[name].layers for name in shared), "scores": scores}


def _compare_scores(name: str, paths: Sequence[Path], first: Score, second: Score) -> dict[str, Any]:
    k, v = ([_places(score, kind) for score in (first, second)] for kind in ("k", "v"))
    layers = sorted(first.layers)
    agreement = {"k": _agreement(*k), "v": _agreement(*v)}
    console.table(
        f"{_title(paths)}: place of each layer by {name}, 1 is most important",
        ["layer", "K first", "K second", "V first", "V second"],
        [[index, k[0][index], k[1][index], v[0][index], v[1][index]] for index in layers],
        footer=f"rank correlation: K {agreement['k']:.3f}, V {agreement['v']:.3f}",
    )
    places = [{"index": index, "k": [k[0][index], k[1][index]], "v": [v[0][index], v[1][index]]} for index in layers]
    return {"rank_correlation": agreement, "places": places}


def _places(score: Score, kind: Literal["k", "v"]) -> dict[int, int]:
    """Layer to place, from 1; ties as the rank method breaks them."""
    order = sorted(score.layers, key=lambda layer: (-getattr(score.layers[layer], kind).mean, layer))
    return {layer: place for place, layer in enumerate(order, start=1)}


def _agreement(first: dict[int, int], second: dict[int, int]) -> float:
    """Spearman's rank correlation; 1 for a single layer."""
    layers = sorted(first)
    return correlation([first[n] for n in layers], [second[n] for n in layers]) if len(layers) > 1 else 1.0


def _changed_settings(first: Plan, second: Plan) -> dict[str, list[Any]]:
    """Cache settings and facts of the model that differ."""
    pairs = {
        **{f"cache.{name}": (getattr(first.cache, name), getattr(second.cache, name)) for name in _fields(first.cache)},
        **{f"model.{name}": (getattr(first.model, name), getattr(second.model, name)) for name in _fields(first.model)},
    }
    return {name: [_plain(name, old), _plain(name, new)] for name, (old, new) in pairs.items() if old != new}


def _fields(settings: Any) -> list[str]:
    return list(type(settings).model_fields)


def _plain(name: str, value: Any) -> Any:
    return in_words(value) if name in _AXES else getattr(value, "short", value)


def _widths(layer: LayerPlan | None) -> str:
    """`k3v4`, with the group size of a tensor that has its own; empty for a layer that the plan leaves out."""
    if layer is None:
        return ""
    return "".join(
        f"{kind[0]}{tensor.bits}" + ("" if tensor.group_size is None else f"/{tensor.group_size}")
        for tensor, kind in layer.tensors
    )


def _title(paths: Sequence[Path]) -> str:
    return f"first {paths[0]}, second {paths[1]}"
