"""KVmix's rule: the layers with the highest scores get more bits, keys and values ranked separately.

Source: arXiv 2506.08018, section 3.2. Ties go to the earlier layer.
"""

from __future__ import annotations

from ..ladder import climb
from ..problem import Decision, Problem

USES = ("score",)


def solve(problem: Problem) -> Decision:
    """Most important first, while the budget lasts. Raises BudgetError."""
    scores = problem.score.layers
    k_order = sorted(problem.layers, key=lambda layer: (-scores[layer].k.mean, layer))
    v_order = sorted(problem.layers, key=lambda layer: (-scores[layer].v.mean, layer))
    return climb(problem, k_order, v_order)
