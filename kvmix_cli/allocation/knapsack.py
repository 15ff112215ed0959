"""The multiple-choice knapsack, exactly: one option for every tensor, by scipy's HiGHS (`scipy.optimize.milp`).

    least_loss      minimise  sum of losses    with  sum of costs <= allowance
    least_cost      minimise  sum of costs     with  sum of losses <= limit; of equal costs the least loss

Costs go in as differences from the cheapest option, divided by what they have in common: small whole numbers, which
HiGHS adds without error. Losses are scaled, so that its absolute tolerance of 1e-6 does not matter. As a bound on whole
choices they would be slow; `least_cost` bisects over costs instead.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import BudgetError
from ..quiet import mute_stdout
from .menus import Menu, Option

SCALE = 1e4
"""What the losses of the cheapest options add up to for HiGHS."""
TOLERANCE = 1e-9
"""Of a limit of loss, relative."""
SECONDS = 60.0
"""80 layers with 15 choices a tensor take a fraction of a second."""


def least_loss(menus: Sequence[Menu], allowance: float) -> list[Option]:
    """The options with the least loss together that cost no more than the allowance, which some must meet."""
    if not menus:
        return []
    knapsack = _Knapsack(menus)
    return knapsack.within(math.floor((allowance - knapsack.floor) / knapsack.unit))


def least_cost(menus: Sequence[Menu], limit: float) -> list[Option]:
    """The options that cost least together with no more loss than the limit, which some must meet."""
    if not menus:
        return []
    most = limit * (1 + TOLERANCE)
    knapsack = _Knapsack([tuple(option for option in menu if option.loss <= most) for menu in menus])
    costs = knapsack.bracket(limit)
    return knapsack.within(costs.start + bisect_left(costs, True, key=lambda cost: knapsack.loss(cost) <= most))


class _Knapsack:
    """Menus as arrays over all their options; costs in units above the cheapest plan.

    Attributes:
        floor: what the cheapest plan costs.
        unit: what a unit costs.
    """

    def __init__(self, menus: Sequence[Menu]) -> None:
        above = [option.cost - menu[0].cost for menu in menus for option in menu]
        self.floor = sum(menu[0].cost for menu in menus)
        self.unit = math.gcd(*above) or 1
        self._menus = menus
        self._options = [option for menu in menus for option in menu]
        self._costs = np.array(above) // self.unit
        self._losses = np.array([option.loss for option in self._options])
        self._sizes = [len(menu) for menu in menus]

    def within(self, most: int) -> list[Option]:
        """The options with the least loss for at most so many units."""
        total = sum(menu[0].loss for menu in self._menus)
        shares = self._minimise(self._losses * (SCALE / total if total else 1), self._costs, most, whole=True)
        return _earlier_first(self._menus, [self._options[place] for place in np.flatnonzero(shares > 0.5)])

    def loss(self, most: int) -> float:
        """The least loss for at most so many units."""
        return sum(option.loss for option in self.within(most))

    def bracket(self, limit: float) -> range:
        """Units that the cheapest plan within a loss can take, by the linear relaxation.

        That may mix options of a menu. No plan is cheaper, and the costliest of what it mixes is a plan.
        """
        scale = SCALE / limit if limit else 1.0
        shares = self._minimise(self._costs, self._losses * scale, limit * scale, whole=False)
        starts = np.cumsum([0, *self._sizes[:-1]])
        highest = np.maximum.reduceat(np.where(shares > TOLERANCE, self._costs, 0), starts)
        return range(math.ceil(shares @ self._costs - 1e-6), int(highest.sum()) + 1)

    def _minimise(self, objective: Any, weights: Any, most: float, *, whole: bool) -> Any:
        """How much of each option is taken: one of every menu in all, with weights of at most `most` together."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix

        count = len(objective)
        menu_of = np.repeat(np.arange(len(self._sizes)), self._sizes)
        one_each = csr_matrix((np.ones(count), (menu_of, np.arange(count))))
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


def _earlier_first(menus: Sequence[Menu], chosen: list[Option]) -> list[Option]:
    """Tensors with the same menu are interchangeable: the earlier ones get the more costly options."""
    alike = defaultdict(list)
    for place, menu in enumerate(menus):
        alike[menu].append(place)
    ordered = list(chosen)
    for places in alike.values():
        options = sorted((chosen[place] for place in places), key=lambda option: option.cost, reverse=True)
        for place, option in zip(places, options, strict=True):
            ordered[place] = option
    return ordered
