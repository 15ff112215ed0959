"""Transform coding: one budget for the directions of all layers and KV heads, of keys and of values.

Source: docs/transform-coding.md; the rule is reverse water-filling, see `allocation.directions`.
"""

from __future__ import annotations

from functools import cache

from ...errors import BudgetError
from ...plan import LayerPlan, TransformTensor
from ..directions import Filling
from ..problem import Decision, Method, Problem


def solve(problem: Problem) -> Decision:
    """Give bits to directions in the order of what they are worth, as far as the budget allows. Raises BudgetError."""
    if not problem.layers:
        return {}
    if problem.budget.limit is None:
        raise BudgetError("method transform has no levels for a share of the layers: give bits, bytes or a loss")
    variances = {slot: each for slot, each in problem.variances.items() if slot[0] in problem.layers}
    filling = Filling.of(variances, problem.code_bits)

    def decision(count: int) -> Decision:
        widths = {
            slot: TransformTensor(widths=tuple("".join(map(str, head)) for head in heads.tolist()))
            for slot, heads in filling.widths(count).items()
        }
        return {layer: LayerPlan(k=widths[layer, "k"], v=widths[layer, "v"]) for layer in problem.layers}

    if problem.loss_limit is not None:
        problem.check_loss(filling.lowest)
        return decision(filling.reaching(problem.loss_limit))
    cost = cache(lambda count: problem.cost(decision(count)))
    problem.check_cost(cost(0), cost(len(filling.worth)))
    return decision(filling.affording(cost, problem.allowance))


METHOD = Method(uses=("basis",), solve=solve)
