"""Several transforms, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from .base import Transform, wide_dtype


class Chain(Transform):
    """Transforms in the order in which they are applied, perhaps none. Rounds once, not at every one of them.

    Attributes:
        is_fitted: nothing is left to be learned.
    """

    def __init__(self, steps: Iterable[Transform] = ()) -> None:
        self.steps = tuple(steps)
        self.is_fitted = not self.steps
        self.needs_queries = any(step.needs_queries for step in self.steps)
        self.shifts_scores = any(step.shifts_scores for step in self.steps)
        self.shifts_output = any(step.shifts_output for step in self.steps)

    def __bool__(self) -> bool:
        return bool(self.steps)

    def fit(self, states: Tensor, query: Tensor | None) -> None:
        """Each step learns from what the steps before it make of the prompt."""
        query = query if self.needs_queries else None
        for number, step in enumerate(self.steps, start=1):
            step.fit(states, query)
            if number < len(self.steps):
                states = step.store(states)
                query = None if query is None else step.query(query)
        self.is_fitted = True

    def store(self, states: Tensor) -> Tensor:
        return _in_turn([step.store for step in self.steps], states)

    def restore(self, stored: Tensor) -> Tensor:
        return _in_turn([step.restore for step in reversed(self.steps)], stored)

    def query(self, query: Tensor) -> Tensor:
        return _in_turn([step.query for step in self.steps], query)

    def output(self, output: Tensor) -> Tensor:
        return _in_turn([step.output for step in reversed(self.steps)], output)

    def tensors(self) -> list[Tensor]:
        return [tensor for step in self.steps for tensor in step.tensors()]

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        for step in self.steps:
            step.apply(change)


def _in_turn(functions: Sequence[Callable[[Tensor], Tensor]], given: Tensor) -> Tensor:
    if not functions:
        return given
    result = given.to(wide_dtype(given.dtype))
    for function in functions:
        result = function(result)
    return result.to(given.dtype)
