"""Curves: the loss of storing a layer's keys or values at a choice, in a score's unit, ready to be summed.

A choice is a width in groups of some size. A row has only `page` keys, or `value_dim` values, so larger groups are the
same as one group per row.

**Noise.** A measured curve may have more loss at 4 bits than at 3, or less than none at 8. In groups of one size a
wider tensor is not worse, so the values are replaced by the nearest ones that fall (isotonic regression), at least 0.
Nothing is assumed between group sizes: 2 bits in groups of 16 take more bytes than 3 bits in groups of 64, and lose
more.

**No curve.** A gradient norm `s` measures how strongly the loss reacts, not how large the error is. The error is
assumed to be that of a uniform quantizer of Gaussian values: a group of `g` of them spans about `2 sqrt(2 ln g)`
standard deviations in `2^b - 1` steps, and its squared error is proportional to the squared step. So the curve is
`s^2 ln(g) / (2^b - 1)^2`, which compares choices but has no unit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from kvmix_kernels.layout import FULL_PRECISION_BITS, Kind

from ..plan import CacheSettings, LayerPlan, ModelInfo, Plan
from ..plan.codec import TransformTensor
from ..plan.forms import page_layout
from ..plan.layers import AnyTensor
from ..plan.tensors.basis import Variances
from ..profile import Score, TensorScore, parse_choice
from .directions import expected_loss


class Curves:
    """Curves of every layer's keys and values, for a model with these cache settings.

    The loss of transform codes is that of the variances of their directions, where these are known.

    Attributes:
        measured: True if the score has measured curves, False if they are assumed.
    """

    def __init__(
        self, score: Score, model: ModelInfo, settings: CacheSettings, variances: Variances = MappingProxyType({})
    ) -> None:
        self.measured = any(score.choices)
        self._variances = variances
        self._score, self._settings, self._model = score, settings, model
        self._page = score.setup.get("page", settings.page)
        self._points = cache(self._clean)

    def at(self, layer: int, kind: Kind, tensor: AnyTensor) -> float | None:
        """Return the loss of a choice: 0 in full precision, None if the score has no value for it."""
        if isinstance(tensor, TransformTensor):
            variances = self._variances.get((layer, "k" if kind == "key" else "v"))
            return None if variances is None else expected_loss(variances, tensor.runs)
        layout = page_layout(tensor, kind, self._settings, self._model.heads(layer).dim(kind))
        if layout is None:
            return 0.0
        if not self.measured:
            return assumed(self._tensor(layer, kind).mean, tensor.bits, layout.group)
        return self._points(layer, kind).get((tensor.bits, layout.group))

    def total(self, layers: Mapping[int, LayerPlan]) -> float | None:
        """Return the loss of a plan's layers together; None if the score has no value for a choice, or a head."""
        total = 0.0
        for layer, plan in layers.items():
            if plan.head_groups:
                return None
            for tensor, kind in plan.tensors:
                loss = self.at(layer, kind, tensor)
                if loss is None:
                    return None
                total += loss
        return total

    def _tensor(self, layer: int, kind: Kind) -> TensorScore:
        scores = self._score.layers[layer]
        return scores.k if kind == "key" else scores.v

    def _clean(self, layer: int, kind: Kind) -> dict[tuple[int, int], float]:
        columns = self._page if kind == "key" else self._model.heads(layer).value_dim
        groups = defaultdict[int, dict[int, float]](dict)
        for key, value in self._tensor(layer, kind).curve.items():
            bits, size = parse_choice(key)
            if bits != FULL_PRECISION_BITS:
                groups[columns if size == "row" else min(size, columns)][bits] = value
        return {(bits, group): loss for group, by_bits in groups.items() for bits, loss in falling(by_bits).items()}


def falling(values: Mapping[int, float]) -> dict[int, float]:
    """Return the nearest values, by least squares, that do not rise with the width; negative ones become 0."""
    from scipy.optimize import isotonic_regression

    widths = sorted(values)
    fitted = isotonic_regression([values[bits] for bits in widths], increasing=False).x
    return {bits: max(0.0, float(value)) for bits, value in zip(widths, fitted, strict=True)}


def assumed(importance: float, bits: int, group: int) -> float:
    """Return the assumed loss at a width and group size for a score without curves; see the module."""
    return float(importance**2 * math.log(group) / (2**bits - 1) ** 2)


def predicted_loss(plan: Plan, score: Score) -> float | None:
    """Return the predicted increase of the mean loss per token, in nats.

    None if the score does not predict loss, is of another model, or has no value for one of the plan's choices.
    """
    if not score.predicts_loss or score.layers.keys() != plan.layers.keys():
        return None
    return Curves(score, plan.model, plan.cache).total(plan.layers)


def other_settings(score: Score, cache: CacheSettings) -> list[str]:
    """Return how a cache differs from the one that curves were measured with, e.g. `page 128 instead of 32`.

    The window counts for moments alone: they leave its pairs out.
    """
    names = ("page", "scale_dtype", "encode", *(["window"] if score.moments else []))
    measured = {name: value for name, value in score.setup.items() if name in names}
    if measured:
        measured.setdefault("encode", "minmax")
    own = {**{name: getattr(cache, name) for name in measured}, "window": cache.window.short}
    changed = [f"{name} {own[name]} instead of {value}" for name, value in measured.items() if own[name] != value]
    return changed + [f"{name}, which it was measured without" for name in cache.axes]
