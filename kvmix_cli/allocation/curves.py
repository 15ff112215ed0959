"""A score's curves, ready to be added up: what storing a layer's keys or values at a choice costs, in the score's unit.

A choice is a width in groups of some size. A row has only `page` keys, or `head_dim` values, so larger groups are the
same as one group a row.

**Noise.** A measured curve may put 4 bits above 3, or 8 bits below nothing. In groups of one size a wider tensor is
not worse: there the values are replaced by the nearest ones that fall (isotonic regression), cut off at 0. Between
group sizes nothing is assumed: 2 bits in groups of 16 take more than 3 bits in groups of 64, and are worse.

**No curve.** A gradient norm `s` says how strongly the loss reacts, not how large the error is. For that a uniform
quantizer of Gaussian values is assumed: a group of `g` of them spans about `2 sqrt(2 ln g)` standard deviations in
`2^b - 1` steps, and its squared error goes with the squared step. So the curve is `s^2 ln(g) / (2^b - 1)^2`: good for
comparing, in no unit at all.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean

from kvmix_kernels.layout import FULL_PRECISION_BITS, Kind

from ..plan import CacheSettings, LayerPlan, ModelInfo, TensorPlan
from ..plan.sizes import page_layout
from ..profile import Score, TensorScore, parse_choice

Point = tuple[int, int]
"""Bits, and elements in a group."""


class Curves:
    """The curves of every layer's keys and values, for a model with these cache settings.

    Attributes:
        measured: whether the score has curves of its own.
    """

    def __init__(self, score: Score, model: ModelInfo, settings: CacheSettings) -> None:
        self.measured = any(score.choices)
        self._score, self._settings, self._head_dim = score, settings, model.head_dim
        page = score.setup.get("page", settings.page)
        self._columns = {"key": page, "value": model.head_dim}
        self._points = cache(self._clean)

    def at(self, layer: int, kind: Kind, tensor: TensorPlan) -> float | None:
        """What this choice costs; 0 in full precision, None if the score has no value for it."""
        layout = page_layout(tensor, kind, self._settings, self._head_dim)
        if layout is None:
            return 0.0
        if not self.measured:
            return assumed(self._tensor(layer, kind).mean, tensor.bits, layout.group)
        return self._points(layer, kind).get((tensor.bits, layout.group))

    def total(self, layers: Mapping[int, LayerPlan]) -> float | None:
        """The sum over a plan's layers; None if the score has no value for one of the choices."""
        total = 0.0
        for layer, plan in layers.items():
            for tensor, kind in plan.tensors:
                loss = self.at(layer, kind, tensor)
                if loss is None:
                    return None
                total += loss
        return total

    def _tensor(self, layer: int, kind: Kind) -> TensorScore:
        scores = self._score.layers[layer]
        return scores.k if kind == "key" else scores.v

    def _clean(self, layer: int, kind: Kind) -> dict[Point, float]:
        columns, groups = self._columns[kind], defaultdict[int, dict[int, float]](dict)
        for key, value in self._tensor(layer, kind).curve.items():
            bits, size = parse_choice(key)
            if bits != FULL_PRECISION_BITS:
                groups[columns if size == "row" else min(size, columns)][bits] = value
        return {(bits, group): loss for group, by_bits in groups.items() for bits, loss in falling(by_bits).items()}


def falling(values: Mapping[int, float]) -> dict[int, float]:
    """The nearest values (least squares) that fall with the width and are not negative.

    Isotonic regression by its min-max formula (Robertson, Wright and Dykstra, 1988, section 1.4).
    """
    widths = sorted(values)
    ordered = [values[bits] for bits in widths]
    return {bits: max(0.0, _fitted(ordered, place)) for place, bits in enumerate(widths)}


def assumed(importance: float, bits: int, group: int) -> float:
    """The curve of a score that has none; see above."""
    return importance**2 * math.log(group) / (2**bits - 1) ** 2


def _fitted(values: Sequence[float], place: int) -> float:
    ends = range(place + 1, len(values) + 1)
    return min(max(fmean(values[start:end]) for end in ends) for start in range(place + 1))
