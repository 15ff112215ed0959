"""Refinement on measured loss: one tensor gets more, another less, and what is really better stays.

Starts from the `ilp` plan, or from `rank`'s if the score has no curves. A neighbour of a plan raises one tensor to its
next option and, where the budget asks for it, lowers another. Neighbours are measured in the order of their predicted
loss; the first that is better becomes the plan, until none is or the trials are used up. So on the documents that are
measured the result is never worse than the start, and it never costs more than the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import NamedTuple

from ..menus import Menu, Option, Slot, decision, menus
from ..problem import Decision, Measure, Problem
from . import ilp, rank

USES = ("score", "group_sizes", "seed")


class Found(NamedTuple):
    """The best plan that was measured, and how many were."""

    decision: Decision
    loss: float
    trials: int


def solve(problem: Problem, measure: Measure, trials: int) -> Found:
    """The best of at most `trials` measured plans. The seed orders neighbours that are predicted alike.

    Raises:
        BudgetError: if no plan meets the budget.
    """
    slots = menus(problem)
    chosen = _start(problem)
    allowance = problem.allowance if problem.loss_limit is None else _cost(chosen)
    draw = Random(problem.seed)
    measured: dict[frozenset[tuple[Slot, Option]], float] = {}

    def loss(candidate: Mapping[Slot, Option]) -> float:
        measured[frozenset(candidate.items())] = lost = measure({**decision(candidate), **problem.pins})
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
    return Found(decision(chosen), least, len(measured))


def _start(problem: Problem) -> dict[Slot, Option]:
    layers = (ilp if problem.curves.measured else rank).solve(problem)
    return {
        (layer, kind): Option(tensor, problem.tensor_cost(tensor, kind), problem.tensor_loss(layer, kind, tensor))
        for layer, plan in layers.items()
        for tensor, kind in plan.tensors
    }


def _neighbours(
    slots: Mapping[Slot, Menu], chosen: Mapping[Slot, Option], room: float, draw: Random
) -> list[dict[Slot, Option]]:
    """Changes of one tensor, or of two, that cost no more than the room there is; the most promising first."""
    changes = list(_changes(slots, chosen, room))
    draw.shuffle(changes)
    return sorted(changes, key=lambda change: sum(to.loss - chosen[slot].loss for slot, to in change.items()))


def _changes(slots: Mapping[Slot, Menu], chosen: Mapping[Slot, Option], room: float) -> Iterator[dict[Slot, Option]]:
    for slot, menu in slots.items():
        higher = next((option for option in menu if option.cost > chosen[slot].cost), None)
        if higher is None:
            continue
        missing = higher.cost - chosen[slot].cost - room
        if missing <= 0:
            yield {slot: higher}
            continue
        for other, options in slots.items():
            lower = [option for option in options if option.cost <= chosen[other].cost - missing]
            if lower and other != slot:
                yield {slot: higher, other: lower[-1]}


def _cost(chosen: Mapping[Slot, Option]) -> int:
    return sum(option.cost for option in chosen.values())
