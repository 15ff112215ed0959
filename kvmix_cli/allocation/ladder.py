"""Climbing: layers move one level up, in a given order, while the budget lasts.

With `L` layers and `moves = L * level + h`, the first `h` of the order are at `level + 1` and the rest at `level`.
Keys and values each have an order of their own and make the same number of moves (KVmix, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..plan import LayerPlan, TensorPlan

if TYPE_CHECKING:
    from .problem import Decision, Problem


class Ladder:
    """The levels that a problem's layers can be at.

    Attributes:
        levels: keys and values, level by level; the shorter ladder of widths stays at its top.
        steps: single moves of one layer, one level up, from all at the lowest level to all at the highest.
    """

    def __init__(self, problem: Problem) -> None:
        k, v = problem.k_bits, problem.v_bits
        top = max(len(k), len(v)) - 1
        pairs = [(k[min(level, len(k) - 1)], v[min(level, len(v) - 1)]) for level in range(top + 1)]
        self.levels = [LayerPlan(k=TensorPlan(bits=a), v=TensorPlan(bits=b)) for a, b in pairs]
        self._layers = problem.layers
        self._costs = [problem.cost(level) for level in self.levels]
        self.steps = len(self._layers) * top

    def cost_after(self, moves: int) -> int:
        """What all layers cost after that many moves."""
        level, higher = self._split(moves)
        rise = self._costs[level + 1] - self._costs[level] if higher else 0
        return len(self._layers) * self._costs[level] + higher * rise

    def after(self, moves: int, k_order: Sequence[int], v_order: Sequence[int]) -> Decision:
        """Where all layers are after that many moves in these orders."""
        level, higher = self._split(moves)
        levels = [*self.levels, self.levels[-1]]
        k_above, v_above = set(k_order[:higher]), set(v_order[:higher])
        return {
            layer: LayerPlan(k=levels[level + (layer in k_above)].k, v=levels[level + (layer in v_above)].v)
            for layer in self._layers
        }

    def _split(self, moves: int) -> tuple[int, int]:
        """The level that all layers have reached, and how many are one above."""
        return divmod(moves, len(self._layers) or 1)


def climb(problem: Problem, k_order: Sequence[int], v_order: Sequence[int]) -> Decision:
    """Spend the budget on keys and on values in these orders of layers, first served first.

    Under `max_loss` it is the fewest moves after which the predicted loss is low enough. Raises BudgetError.
    """
    ladder = problem.ladder
    fitting = problem.within(
        range(ladder.steps + 1),
        cost=ladder.cost_after,
        loss=lambda moves: problem.loss(ladder.after(moves, k_order, v_order)),
    )
    return ladder.after(max(fitting) if problem.loss_limit is None else min(fitting), k_order, v_order)
