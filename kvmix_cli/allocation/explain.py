"""Why a plan gives a tensor what it gives: importance, what its choice is predicted to cost, and what would be next.

Pure: a plan and scores in, reasons out, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from kvmix_kernels.layout import FULL_PRECISION_BITS, Kind

from ..plan import WIDTHS, Plan, TensorPlan
from ..plan.sizes import page_layout, tensor_bits
from ..profile import Score
from .curves import Curves

_KINDS: Final[tuple[Kind, ...]] = ("key", "value")


@dataclass(frozen=True)
class Upgrade:
    """A choice for one layer's keys or values that takes more and loses less.

    Attributes:
        saves: predicted loss, in nats a token.
        costs: stored bits, in the plan's mean.
    """

    tensor: TensorPlan
    saves: float
    costs: float

    @property
    def worth(self) -> float:
        """Nats a stored bit."""
        return self.saves / self.costs


@dataclass(frozen=True)
class Reason:
    """What one layer's keys or values get, and why.

    Attributes:
        importance: by the score that decided.
        loss: that the choice is predicted to cost, in nats a token; None without a prediction.
        upgrade: the choice that is worth most; None if nothing can be saved, or without a prediction.
    """

    layer: int
    kind: Kind
    tensor: TensorPlan
    importance: float
    loss: float | None = None
    upgrade: Upgrade | None = None


def explain(plan: Plan, importance: Score, prediction: Score | None) -> list[Reason]:
    """The reasons of every layer's keys and values, in order.

    Args:
        importance: the score that the plan was made with.
        prediction: a score whose curves are in nats.
    """
    curves = Curves(prediction, plan.model, plan.cache) if prediction else None
    return [_reason(plan, layer, kind, importance, curves) for layer in sorted(plan.layers) for kind in _KINDS]


def next_upgrade(reasons: Sequence[Reason]) -> Reason | None:
    """The tensor whose upgrade is worth most: what a slightly larger budget would buy."""
    return max((reason for reason in reasons if reason.upgrade), key=_worth, default=None)


def _reason(plan: Plan, layer: int, kind: Kind, importance: Score, curves: Curves | None) -> Reason:
    tensor, score = (getattr(of.layers[layer], kind[0]) for of in (plan, importance))
    loss = curves.at(layer, kind, tensor) if curves else None
    reason = Reason(layer, kind, tensor, score.mean, loss)
    if curves is None or loss is None:
        return reason
    best = max(_upgrades(plan, reason, loss, curves), key=lambda upgrade: upgrade.worth, default=None)
    return replace(reason, upgrade=best)


def _upgrades(plan: Plan, reason: Reason, loss: float, curves: Curves) -> Iterator[Upgrade]:
    now = _stored(plan, reason.kind, reason.tensor)
    for choice in _choices(plan, reason.kind):
        costs = (_stored(plan, reason.kind, choice) - now) / (2 * len(plan.layers))
        other = curves.at(reason.layer, reason.kind, choice)
        if costs > 0 and other is not None and other < loss:
            yield Upgrade(choice, loss - other, costs)


def _choices(plan: Plan, kind: Kind) -> list[TensorPlan]:
    """Every width, in the group sizes that the plan uses; what is the same for rows of this kind only once."""
    sizes = {tensor.group_size for layer in plan.layers.values() for tensor, _ in layer.tensors}
    found: dict[tuple[int, int | None], TensorPlan] = {}
    for size in sorted(sizes, key=lambda size: (size is not None, str(size))):
        for bits in WIDTHS:
            choice = TensorPlan(bits=bits, group_size=None if bits == FULL_PRECISION_BITS else size)
            layout = page_layout(choice, kind, plan.cache, plan.model.head_dim)
            found.setdefault((bits, layout.group if layout else None), choice)
    return list(found.values())


def _stored(plan: Plan, kind: Kind, tensor: TensorPlan) -> float:
    return tensor_bits(tensor, kind, plan.cache, plan.model.head_dim, "stored")


def _worth(reason: Reason) -> float:
    return reason.upgrade.worth if reason.upgrade else 0.0
