"""The same widths in every layer: the most bits that the budget allows.

Of pairs with equally many bits the more balanced one is taken, and of K 4 / V 2 and K 2 / V 4 the one with more for
the keys, whose error the softmax amplifies (KIVI, arXiv 2402.02750; KVTuner, arXiv 2502.04420).
"""

from __future__ import annotations

from itertools import product

from ...plan import LayerPlan
from ..problem import Decision, Method, Problem


def solve(problem: Problem) -> Decision:
    """Decide the widest pair of widths within the budget; under `max_loss` the narrowest. Raises BudgetError."""
    layers = problem.layers
    pairs = problem.within(
        [LayerPlan.of_bits(k, v) for k, v in product(problem.k_bits, problem.v_bits)],
        cost=lambda pair: problem.cost(dict.fromkeys(layers, pair)),
        loss=lambda pair: problem.loss(dict.fromkeys(layers, pair)),
    )
    sign = 1 if problem.loss_limit is None else -1

    def preference(pair: LayerPlan) -> tuple[int, int, int]:
        k, v = pair.k.bits, pair.v.bits
        return sign * (k + v), -abs(k - v), k

    return dict.fromkeys(layers, max(pairs, key=preference))


METHOD = Method(solve=solve)
