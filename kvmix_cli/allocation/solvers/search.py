"""Refinement by measured loss: one tensor gets more bits, another one fewer, and a change that measures better is kept.

The search starts from the plan of `ilp`, or of `rank` if the score has no curves. A neighbour of a plan raises one
tensor to its next choice and, if the budget requires it, lowers another. Neighbours are measured in the order of their
predicted loss. The first one that is better becomes the plan, until none is or all trials are used. So on the documents
that are measured the result is never worse than the start, and it never costs more than the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import NamedTuple

from ..choices import Choices, Slot, TensorChoice, choices_by_slot, decide
from ..problem import Decision, Measure, Method, Problem
from . import ilp, rank

METHOD = Method(uses=("score", "group_sizes", "seed"))


class Refined(NamedTuple):
    """The best plan that was measured, and the number of plans that were."""

    decision: Decision
    loss: float
    trials: int


def solve_by_measuring(problem: Problem, measure: Measure, trials: int) -> Refined:
    """Return the best of at most `trials` measured plans. The seed orders neighbours of equal predicted loss.

    Raises:
        BudgetError: if no plan meets the budget.
    """
    slots = choices_by_slot(problem)
    chosen = _start(problem)
    allowance = problem.allowance if problem.loss_limit is None else _cost(chosen)
    draw = Random(problem.seed)
    measured: dict[frozenset[tuple[Slot, TensorChoice]], float] = {}

    def loss(candidate: Mapping[Slot, TensorChoice]) -> float:
        measured[frozenset(candidate.items())] = lost = measure({**decide(candidate), **problem.pins})
        return lost

    least, improving = loss(chosen), True
    while improving:
        improving = False
        for change in _neighbours(slots, chosen, allowance - _cost(chosen), draw):
            candidate = {**chosen, **change}
            if len(measured) >= trials:
                break
            if frozenset(candidate.items()) not in measured and (lost := loss(candidate)) < least:
                chosen, least, improving = candidate, lost, True
                break
    return Refined(decide(chosen), least, len(measured))


def _start(problem: Problem) -> dict[Slot, TensorChoice]:
    layers = (ilp if problem.curves.measured else rank).solve(problem)
    return {
        (layer, kind): TensorChoice(
            tensor, problem.tensor_cost(layer, kind, tensor), problem.tensor_loss(layer, kind, tensor)
        )
        for layer, plan in layers.items()
        for tensor, kind in plan.tensors
    }


def _neighbours(
    slots: Mapping[Slot, Choices], chosen: Mapping[Slot, TensorChoice], room: float, draw: Random
) -> list[dict[Slot, TensorChoice]]:
    """Return changes of one tensor, or of two, that add at most `room` to the cost, by predicted loss."""
    changes = list(_changes(slots, chosen, room))
    draw.shuffle(changes)
    return sorted(changes, key=lambda change: sum(to.loss - chosen[slot].loss for slot, to in change.items()))


def _changes(
    slots: Mapping[Slot, Choices], chosen: Mapping[Slot, TensorChoice], room: float
) -> Iterator[dict[Slot, TensorChoice]]:
    for slot, choices in slots.items():
        higher = next((choice for choice in choices if choice.cost > chosen[slot].cost), None)
        if higher is None:
            continue
        missing = higher.cost - chosen[slot].cost - room
        if missing <= 0:
            yield {slot: higher}
            continue
        for other, others in slots.items():
            lower = [choice for choice in others if choice.cost <= chosen[other].cost - missing]
            if lower and other != slot:
                yield {slot: higher, other: lower[-1]}


def _cost(chosen: Mapping[Slot, TensorChoice]) -> int:
    return sum(choice.cost for choice in chosen.values())
