"""What can be chosen for every tensor, with its cost and loss: a problem as methods see it that weigh choices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kvmix_kernels.layout import Kind

from ..plan import LayerPlan, TensorPlan
from .problem import KINDS, Decision, Problem

Slot = tuple[int, Kind]
"""A layer's keys or values."""


class Option(NamedTuple):
    """One way to store a tensor."""

    tensor: TensorPlan
    cost: int
    loss: float


Menu = tuple[Option, ...]


def menus(problem: Problem) -> dict[Slot, Menu]:
    """The options of every tensor, cheapest first, layer by layer. Raises BudgetError if the score lacks a choice."""
    found = {}
    costs = {kind: [(tensor, problem.tensor_cost(tensor, kind)) for tensor in problem.choices(kind)] for kind in KINDS}
    for layer in problem.layers:
        for kind in KINDS:
            options = [Option(*each, problem.tensor_loss(layer, kind, each[0])) for each in costs[kind]]
            found[layer, kind] = undominated(options)
    return found


def undominated(options: Iterable[Option]) -> Menu:
    """Without options that cost as much as another, or more, and are predicted no better."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda each: (each.cost, each.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return tuple(kept)


def decision(chosen: Mapping[Slot, Option]) -> Decision:
    """The layers that these choices for all tensors make."""
    layers = sorted({layer for layer, _ in chosen})
    return {layer: LayerPlan(k=chosen[layer, "key"].tensor, v=chosen[layer, "value"].tensor) for layer in layers}
