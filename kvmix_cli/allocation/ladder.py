"""Climbing: layers move one level up, in a given order, while the budget lasts.

With `L` layers and `moves = L * level + h`, the first `h` of the order are at `level + 1` and the rest at `level`.
Keys and values each have an order of their own and make the same number of moves (KVmix, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

from .base import Problem, Widths


def moves_within(problem: Problem) -> int:
    """The most moves that the budget allows. Raises BudgetError if it does not even allow none."""
    problem.check_reachable()
    allowance = problem.allowance
    return max(moves for moves in range(problem.steps + 1) if problem.cost_after(moves) <= allowance)


def climb(problem: Problem, k_order: Sequence[int], v_order: Sequence[int]) -> Widths:
    """Spend the budget on keys and on values in these orders of layers, first served first."""
    level, higher = divmod(moves_within(problem), len(problem.scores))
    levels = [*problem.levels, problem.levels[-1]]
    k_above, v_above = set(k_order[:higher]), set(v_order[:higher])
    return {
        layer: (levels[level + (layer in k_above)][0], levels[level + (layer in v_above)][1])
        for layer in sorted(problem.scores)
    }
