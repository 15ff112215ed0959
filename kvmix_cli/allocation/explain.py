"""Reasons for a plan's widths: each tensor's importance, the predicted loss of its choice, and its best upgrade."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kvmix_kernels.layout import FULL_PRECISION_BITS, KINDS, Kind

from ..plan import WIDTHS, CacheSettings, HeadGeometry, Plan, TensorPlan
from ..plan.codec import TransformTensor
from ..plan.forms import page_layout
from ..plan.sizes import tensor_bits
from ..profile import Score
from .curves import Curves


@dataclass(frozen=True)
class Upgrade:
    """A choice for one layer's keys or values that takes more bits and loses less.

    Attributes:
        saves: predicted loss that it saves, in nats per token.
        costs: stored bits that it adds to the plan's mean.
    """

    tensor: TensorPlan
    saves: float
    costs: float

    @property
    def worth(self) -> float:
        """Return the nats that it saves per stored bit."""
        return self.saves / self.costs


@dataclass(frozen=True)
class Reason:
    """Storage of one layer's keys or values, with the reasons for it.

    Attributes:
        importance: importance by the score that decided.
        loss: predicted loss of the choice, in nats per token; None without a prediction.
        upgrade: upgrade with the highest worth; None if nothing can be saved, or without a prediction.
    """

    layer: int
    kind: Kind
    tensor: TensorPlan
    importance: float
    loss: float | None = None
    upgrade: Upgrade | None = None


def explain(plan: Plan, importance: Score, prediction: Score | None) -> list[Reason]:
    """Return the reasons for every layer's keys and values, in order.

    Args:
        importance: score that the plan was made with.
        prediction: score whose curves are in nats.
    """
    curves = Curves(prediction, plan.model, plan.cache) if prediction else None
    elements = plan.unquantized_bytes(1, element_bytes=1)
    slots = [(layer, kind) for layer in sorted(plan.layers) for kind in KINDS]
    return [_reason(plan, layer, kind, importance, curves, elements) for layer, kind in slots]


def next_upgrade(reasons: Sequence[Reason]) -> Reason | None:
    """Return the tensor whose upgrade has the highest worth, the first one that a larger budget would pay for."""
    worth = [(reason.upgrade.worth, reason) for reason in reasons if reason.upgrade]
    return max(worth, key=lambda each: each[0], default=(0.0, None))[1]


def _reason(plan: Plan, layer: int, kind: Kind, importance: Score, curves: Curves | None, elements: int) -> Reason:
    """Return the reasons for a tensor of a plan whose layers hold this many elements a token."""
    tensor, score = (getattr(of.layers[layer], kind[0]) for of in (plan, importance))
    loss = curves.at(layer, kind, tensor) if curves else None
    reason = Reason(layer, kind, tensor, score.mean, loss)
    if curves is None or loss is None or isinstance(tensor, TransformTensor):
        return reason
    best = max(_upgrades(plan, reason, loss, curves, elements), key=lambda upgrade: upgrade.worth, default=None)
    return replace(reason, upgrade=best)


def _upgrades(plan: Plan, reason: Reason, loss: float, curves: Curves, elements: int) -> Iterator[Upgrade]:
    heads, settings = plan.model.heads(reason.layer), plan.layers[reason.layer].settings(plan.cache)
    now = _stored(settings, heads, reason.kind, reason.tensor)
    for choice in _choices(plan, heads, reason.kind):
        costs = (_stored(settings, heads, reason.kind, choice) - now) * heads.elements(reason.kind) / elements
        other = curves.at(reason.layer, reason.kind, choice)
        if costs > 0 and other is not None and other < loss:
            yield Upgrade(choice, loss - other, costs)


def _choices(plan: Plan, heads: HeadGeometry, kind: Kind) -> list[TensorPlan]:
    """Return every width in the plan's group sizes, without sizes that are the same for a row of this kind."""
    sizes = {tensor.group_size for layer in plan.layers.values() for tensor, _ in layer.affine}
    found: dict[tuple[int, int | None], TensorPlan] = {}
    for size in sorted(sizes, key=lambda size: (size is not None, str(size))):
        for bits in WIDTHS:
            choice = TensorPlan(bits=bits, group_size=None if bits == FULL_PRECISION_BITS else size)
            layout = page_layout(choice, kind, plan.cache, heads.dim(kind))
            found.setdefault((bits, layout.group if layout else None), choice)
    return list(found.values())


def _stored(settings: CacheSettings, heads: HeadGeometry, kind: Kind, tensor: TensorPlan) -> float:
    return tensor_bits(tensor, kind, settings, heads.dim(kind), "stored")
