"""KVmix's rule: the layers with the highest scores get more bits, keys and values ranked separately.

Source: arXiv 2506.08018, section 3.2. Ties go to the earlier layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..problem import Decision, Method, Problem


def solve(problem: Problem) -> Decision:
    """Raise the most important layers first, as far as the budget allows. Raises BudgetError."""
    scores = problem.score.layers
    k_order = sorted(problem.layers, key=lambda layer: (-scores[layer].k.mean, layer))
    v_order = sorted(problem.layers, key=lambda layer: (-scores[layer].v.mean, layer))
    return raise_in_order(problem, k_order, v_order)


def raise_in_order(problem: Problem, k_order: Sequence[int], v_order: Sequence[int]) -> Decision:
    """Raise layers in these orders of keys and of values, by one level each, as far as the budget allows.

    Under `max_loss` these are the fewest moves after which the predicted loss is low enough. Raises BudgetError.
    """
    levels = problem.levels
    if problem.budget.limit is None:
        return levels.after(problem.share_moves, k_order, v_order)
    fitting = problem.within(
        range(levels.moves + 1),
        cost=levels.costs(k_order, v_order).__getitem__,
        loss=lambda moves: problem.loss(levels.after(moves, k_order, v_order)),
    )
    return levels.after(max(fitting) if problem.loss_limit is None else min(fitting), k_order, v_order)


METHOD = Method(uses=("score",), solve=solve)
