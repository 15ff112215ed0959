"""KVmix's rule: the layers with the highest scores get more bits, keys and values ranked separately.

Source: arXiv 2506.08018, section 3.2. Ties go to the earlier layer.
"""

from __future__ import annotations

from .base import Problem, Widths
from .ladder import climb

USES = ("score",)


def solve(problem: Problem) -> Widths:
    """Most important first, while the budget lasts. Raises BudgetError."""
    k_order = sorted(problem.scores, key=lambda layer: (-problem.scores[layer].k.mean, layer))
    v_order = sorted(problem.scores, key=lambda layer: (-problem.scores[layer].v.mean, layer))
    return climb(problem, k_order, v_order)
