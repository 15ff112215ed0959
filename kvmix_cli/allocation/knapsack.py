"""The multiple-choice knapsack, solved exactly by HiGHS (`scipy.optimize.milp`): one choice for every tensor.

    least_loss      minimise  sum of losses    with  sum of costs <= allowance
    least_cost      minimise  sum of costs     with  sum of losses <= limit; of equal costs the least loss

Costs are given to HiGHS as differences from the cheapest choice, divided by their common divisor: small whole numbers,
which it adds without error. Losses are scaled, so that its absolute tolerance of 1e-6 does not matter. A bound on the
sum of losses would be slow with whole choices; `least_cost` bisects over costs instead.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ..errors import BudgetError
from ..quiet import mute_stdout

SCALE = 1e4
"""Sum of the losses of the cheapest choices after scaling."""
TOLERANCE = 1e-9
"""Relative tolerance of a limit of loss."""
SECONDS = 60.0
"""Time limit of HiGHS; 80 layers with 15 choices per tensor take a fraction of a second."""


class WeighedChoice(Protocol):
    """A choice with a cost and a loss."""

    @property
    def cost(self) -> int:
        """Return the cost, in whole units."""

    @property
    def loss(self) -> float:
        """Return the loss."""


C = TypeVar("C", bound=WeighedChoice)


def least_loss(slots: Sequence[tuple[C, ...]], allowance: float) -> list[C]:
    """Return one choice for every slot, with the least loss together and a cost of at most `allowance`.

    Raises:
        BudgetError: if HiGHS finds no solution.
    """
    if not slots:
        return []
    knapsack = _Knapsack(slots)
    return knapsack.within(math.floor((allowance - knapsack.floor) / knapsack.unit))


def least_cost(slots: Sequence[tuple[C, ...]], limit: float) -> list[C]:
    """Return one choice for every slot, with the least cost together and a loss of at most `limit`.

    Raises:
        BudgetError: if HiGHS finds no solution.
    """
    if not slots:
        return []
    most = limit * (1 + TOLERANCE)
    knapsack = _Knapsack([tuple(choice for choice in choices if choice.loss <= most) for choices in slots])
    costs = knapsack.bracket(limit)
    return knapsack.within(costs.start + bisect_left(costs, True, key=lambda cost: knapsack.loss(cost) <= most))


class _Knapsack(Generic[C]):
    """Choices of all slots as arrays; costs in units above the cheapest plan.

    Attributes:
        floor: cost of the cheapest plan.
        unit: cost of one unit.
    """

    def __init__(self, slots: Sequence[tuple[C, ...]]) -> None:
        above = [choice.cost - choices[0].cost for choices in slots for choice in choices]
        self.floor = sum(choices[0].cost for choices in slots)
        self.unit = math.gcd(*above) or 1
        self._slots = slots
        self._choices = [choice for choices in slots for choice in choices]
        self._costs = np.array(above) // self.unit
        self._losses = np.array([choice.loss for choice in self._choices])
        self._sizes = [len(choices) for choices in slots]

    def within(self, most: int) -> list[C]:
        """Return the choices with the least loss for at most `most` units."""
        total = sum(choices[0].loss for choices in self._slots)
        shares = self._minimise(self._losses * (SCALE / total if total else 1), self._costs, most, whole=True)
        return _earlier_first(self._slots, [self._choices[place] for place in np.flatnonzero(shares > 0.5)])

    def loss(self, most: int) -> float:
        """Return the least loss for at most `most` units."""
        return sum(choice.loss for choice in self.within(most))

    def bracket(self, limit: float) -> range:
        """Return the range of units of the cheapest plan within a loss, by the linear relaxation.

        The relaxation may mix choices of a slot. No plan costs less than it, and the costliest choices that it mixes
        are a plan.
        """
        scale = SCALE / limit if limit else 1.0
        shares = self._minimise(self._costs, self._losses * scale, limit * scale, whole=False)
        starts = np.cumsum([0, *self._sizes[:-1]])
        highest = np.maximum.reduceat(np.where(shares > TOLERANCE, self._costs, 0), starts)
        return range(math.ceil(shares @ self._costs - 1e-6), int(highest.sum()) + 1)

    def _minimise(self, objective: Any, weights: Any, most: float, *, whole: bool) -> Any:
        """Return the share of each choice, 1 for every slot together, with weights of at most `most` in all."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix

        count = len(objective)
        slot_of = np.repeat(np.arange(len(self._sizes)), self._sizes)
        one_each = csr_matrix((np.ones(count), (slot_of, np.arange(count))))
        with mute_stdout():
            result = milp(
                objective,
                integrality=np.full(count, int(whole)),
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weights[np.newaxis], ub=most)],
                options={"mip_rel_gap": 0, "time_limit": SECONDS},
            )
        if result.status != 0:
            raise BudgetError(f"no plan found ({result.message}): try fewer widths or group sizes, or another budget")
        return result.x


def _earlier_first(slots: Sequence[tuple[C, ...]], chosen: list[C]) -> list[C]:
    """Return the choices with the costlier ones first among slots that have the same choices."""
    alike = defaultdict[tuple[C, ...], list[int]](list)
    for place, choices in enumerate(slots):
        alike[choices].append(place)
    ordered = list(chosen)
    for places in alike.values():
        sorted_choices = sorted((chosen[place] for place in places), key=lambda choice: choice.cost, reverse=True)
        for place, choice in zip(places, sorted_choices, strict=True):
            ordered[place] = choice
    return ordered
