"""AsymKV's rule: the first layers have a higher width, the rest the next lower one, separately for keys and values.

Source: arXiv 2410.13212, where the first `l_k` layers keep more bits for keys and the first `l_v` for values. With
curves the two cuts with the lowest predicted loss are chosen. Without curves keys are raised first, as in AsymKV,
because their error passes through the softmax.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from kvmix_kernels.layout import Kind

from ...plan import LayerPlan, TensorPlan
from ..problem import Decision, Method, Problem


class Prefix(NamedTuple):
    """Keys, or values, of all layers after some moves, each of which raises one layer by one width, in order."""

    moves: int
    cost: int
    loss: float
    tensors: tuple[TensorPlan, ...]


def solve(problem: Problem) -> Decision:
    """Decide the best pair of cuts within the budget; under `max_loss` the smallest. Raises BudgetError."""
    pairs = problem.within(
        product(_prefixes(problem, "key"), _prefixes(problem, "value")),
        cost=lambda pair: pair[0].cost + pair[1].cost,
        loss=lambda pair: pair[0].loss + pair[1].loss,
    )
    keys, values = min(pairs, key=lambda pair: _preference(problem, *pair))
    tensors = zip(problem.layers, keys.tensors, values.tensors, strict=True)
    return {layer: LayerPlan(k=k, v=v) for layer, k, v in tensors}


def _preference(problem: Problem, keys: Prefix, values: Prefix) -> tuple[float, float, int]:
    """Return a sort key; the pair with the lowest is the best."""
    cost, loss = keys.cost + values.cost, keys.loss + values.loss
    if problem.loss_limit is not None:
        return cost, loss, -keys.moves
    return (loss, cost, -keys.moves) if problem.curves.measured else (-keys.moves, -values.moves, 0)


def _prefixes(problem: Problem, kind: Kind) -> list[Prefix]:
    widths = [TensorPlan(bits=bits) for bits in (problem.k_bits if kind == "key" else problem.v_bits)]
    count = len(problem.layers)
    prefixes = []
    for moves in range(count * (len(widths) - 1) + 1):
        level, higher = divmod(moves, count or 1)
        tensors = [widths[level + (place < higher)] for place in range(count)]
        slots = list(zip(problem.layers, [kind] * count, tensors, strict=True))
        loss = sum(problem.tensor_loss(*slot) for slot in slots)
        cost = sum(problem.tensor_cost(*slot) for slot in slots)
        prefixes.append(Prefix(moves, cost, loss, tuple(tensors)))
    return prefixes


METHOD = Method(uses=("score",), solve=solve)
