"""The same widths in every layer: the most bits that the budget allows.

Of pairs with as many bits the more balanced one is taken, and of K 4 / V 2 and K 2 / V 4 the one with more for the
keys, whose error the softmax amplifies (KIVI, arXiv 2402.02750; KVTuner, arXiv 2502.04420).
"""

from __future__ import annotations

from itertools import product

from ...plan import LayerPlan, TensorPlan
from ..problem import Decision, Problem

USES: tuple[str, ...] = ()


def solve(problem: Problem) -> Decision:
    """The highest pair of widths within the budget; under `max_loss` the smallest. Raises BudgetError."""
    layers = problem.layers
    pairs = problem.within(
        [LayerPlan(k=TensorPlan(bits=k), v=TensorPlan(bits=v)) for k, v in product(problem.k_bits, problem.v_bits)],
        cost=lambda pair: len(layers) * problem.cost(pair),
        loss=lambda pair: problem.loss(dict.fromkeys(layers, pair)),
    )
    sign = 1 if problem.loss_limit is None else -1
    return dict.fromkeys(layers, max(pairs, key=lambda pair: (sign * (pair.k.bits + pair.v.bits), *_balance(pair))))


def _balance(pair: LayerPlan) -> tuple[int, int]:
    return -abs(pair.k.bits - pair.v.bits), pair.k.bits
