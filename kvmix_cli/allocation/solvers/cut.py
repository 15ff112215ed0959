"""AsymKV's rule: the first layers are at higher widths, the rest one width lower; keys and values have a cut each.

Source: arXiv 2410.13212, where the first `l_k` layers keep more bits for keys and the first `l_v` for values. A score
with curves chooses the two cuts with the lowest predicted loss. Without one keys come first, as in AsymKV: their error
goes through the softmax.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from kvmix_kernels.layout import Kind

from ...plan import LayerPlan, TensorPlan
from ..problem import Decision, Problem

USES = ("score",)


class Prefix(NamedTuple):
    """Keys, or values, of all layers after some moves of one layer one width up, first layer first."""

    moves: int
    cost: int
    loss: float
    tensors: tuple[TensorPlan, ...]


def solve(problem: Problem) -> Decision:
    """The best pair of cuts within the budget; under `max_loss` the smallest. Raises BudgetError."""
    pairs = problem.within(
        product(_prefixes(problem, "key"), _prefixes(problem, "value")),
        cost=lambda pair: pair[0].cost + pair[1].cost,
        loss=lambda pair: pair[0].loss + pair[1].loss,
    )
    keys, values = min(pairs, key=lambda pair: _preference(problem, *pair))
    tensors = zip(problem.layers, keys.tensors, values.tensors, strict=True)
    return {layer: LayerPlan(k=k, v=v) for layer, k, v in tensors}


def _preference(problem: Problem, keys: Prefix, values: Prefix) -> tuple[float, float, int]:
    """The lowest is best."""
    cost, loss = keys.cost + values.cost, keys.loss + values.loss
    if problem.loss_limit is not None:
        return cost, loss, -keys.moves
    return (loss, cost, -keys.moves) if problem.curves.measured else (-keys.moves, -values.moves, 0)


def _prefixes(problem: Problem, kind: Kind) -> list[Prefix]:
    ladder = [TensorPlan(bits=bits) for bits in (problem.k_bits if kind == "key" else problem.v_bits)]
    count = len(problem.layers)
    prefixes = []
    for moves in range(count * (len(ladder) - 1) + 1):
        level, higher = divmod(moves, count or 1)
        tensors = [ladder[level + (place < higher)] for place in range(count)]
        loss = sum(problem.tensor_loss(*each) for each in zip(problem.layers, [kind] * count, tensors, strict=True))
        cost = sum(problem.tensor_cost(tensor, kind) for tensor in tensors)
        prefixes.append(Prefix(moves, cost, loss, tuple(tensors)))
    return prefixes
