"""The same widths in every layer: the most bits that the budget allows.

Of pairs with as many bits the more balanced one is taken, and of K 4 / V 2 and K 2 / V 4 the one with more for the
keys, whose error the softmax amplifies (KIVI, arXiv 2402.02750; KVTuner, arXiv 2502.04420).
"""

from __future__ import annotations

from itertools import product

from .base import Problem, Widths

USES: tuple[str, ...] = ()


def solve(problem: Problem) -> Widths:
    """The highest pair of widths within the budget. Raises BudgetError."""
    problem.check_reachable()
    layers, allowance = sorted(problem.scores), problem.allowance
    pairs = [pair for pair in product(problem.k_bits, problem.v_bits) if len(layers) * problem.cost(pair) <= allowance]
    best = max(pairs, key=lambda pair: (sum(pair), -abs(pair[0] - pair[1]), pair[0]))
    return dict.fromkeys(layers, best)
