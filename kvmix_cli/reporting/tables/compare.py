"""Differences between plans and between profiles as tables, and as plain data for `--json`."""

from __future__ import annotations

from typing import Any

from ...evaluation.results import Table
from ...plan import LayerPlan
from ...plan.settings import AXES
from ...studies.compare import PlanDifference, ProfileDifference
from ..words import codes_in_words, in_words, own_heads, own_tokens

Names = tuple[object, object]
"""The files of the first and of the second, for titles."""


def plans_table(difference: PlanDifference, names: Names) -> Table:
    """Return a table of the layers that differ, with settings and bits in the footer."""
    plain = plans_json(difference)
    footer = [f"{name}: {old} -> {new}" for name, (old, new) in plain["settings"].items()]
    footer += [f"{name} bits: {old:.4g} -> {new:.4g}" for name, (old, new) in difference.bits.items()]
    footer += [f"{len(difference.changed)} of {difference.layers} layers differ"]
    rows = [[f"{each['index']}", *each["widths"]] for each in plain["layers"]]
    return Table(_title(names), ["layer", "first", "second"], rows, "\n".join(footer))


def plans_json(difference: PlanDifference) -> dict[str, Any]:
    """Return the differences between two plans as plain data."""
    return {
        "same": difference.same,
        "layers": [
            {"index": index, "widths": [_widths(first), _widths(second)]}
            for index, (first, second) in difference.changed.items()
        ],
        "settings": {name: [_plain(name, each) for each in pair] for name, pair in difference.settings.items()},
        "bits": {name: list(pair) for name, pair in difference.bits.items()},
    }


def profiles_tables(difference: ProfileDifference, names: Names) -> list[Table]:
    """Return a table for every score with the place of each layer in either profile."""
    return [
        Table(
            f"{_title(names)}: place of each layer by {name}, 1 is most important",
            ["layer", "K first", "K second", "V first", "V second"],
            [
                [f"{place}" for place in (index, k.first[index], k.second[index], v.first[index], v.second[index])]
                for index in sorted(k.first)
            ],
            f"rank correlation: K {k.correlation:.3f}, V {v.correlation:.3f}",
        )
        for name, (k, v) in difference.rankings.items()
    ]


def profiles_json(difference: ProfileDifference) -> dict[str, Any]:
    """Return the rankings of two profiles as plain data."""
    scores = {
        name: {
            "rank_correlation": {"k": k.correlation, "v": v.correlation},
            "places": [
                {"index": index, "k": [k.first[index], k.second[index]], "v": [v.first[index], v.second[index]]}
                for index in sorted(k.first)
            ],
        }
        for name, (k, v) in difference.rankings.items()
    }
    return {"same": difference.same, "scores": scores}


def _plain(name: str, value: Any) -> Any:
    if name == "cache.transform":
        return "none" if value is None else codes_in_words(value)
    return in_words(value) if name.removeprefix("cache.") in AXES else getattr(value, "short", value)


def _widths(layer: LayerPlan | None) -> str:
    """Return `k3v4`, with all that the layer has of its own; empty for a layer that the plan does not have."""
    if layer is None:
        return ""
    widths = "".join(f"{kind[0]}{'/'.join([tensor.short, *tensor.own])}" for tensor, kind in layer.tensors)
    return "; ".join(filter(None, (widths, own_tokens(layer.tokens), own_heads(layer.head_groups))))


def _title(names: Names) -> str:
    return f"first {names[0]}, second {names[1]}"
