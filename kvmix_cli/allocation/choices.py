"""Choices for every tensor with their cost and loss, for solvers that weigh them against each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kvmix_kernels.layout import KINDS, Kind

from ..plan import LayerPlan, TensorPlan
from .problem import Decision, Problem

Slot = tuple[int, Kind]
"""A layer's keys or values."""


class TensorChoice(NamedTuple):
    """One way to store a tensor, with its cost (see `Budget.cost`) and its loss in the score's unit."""

    tensor: TensorPlan
    cost: int
    loss: float


Choices = tuple[TensorChoice, ...]
"""Choices for one tensor, the cheapest first, each with less loss than the one before it."""


def choices_by_slot(problem: Problem) -> dict[Slot, Choices]:
    """Return the choices for every tensor, layer by layer. Raises BudgetError if the score lacks one of them."""
    return {
        (layer, kind): undominated(
            TensorChoice(tensor, problem.tensor_cost(layer, kind, tensor), problem.tensor_loss(layer, kind, tensor))
            for tensor in problem.tensors(layer, kind)
        )
        for layer in problem.layers
        for kind in KINDS
    }


def undominated(choices: Iterable[TensorChoice]) -> Choices:
    """Return the choices without those for which another one costs no more and loses no more."""
    kept: list[TensorChoice] = []
    for choice in sorted(choices, key=lambda each: (each.cost, each.loss)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return tuple(kept)


def decide(chosen: Mapping[Slot, TensorChoice]) -> Decision:
    """Return the layers that one choice for every tensor makes."""
    layers = sorted({layer for layer, _ in chosen})
    return {layer: LayerPlan(k=chosen[layer, "key"].tensor, v=chosen[layer, "value"].tensor) for layer in layers}
