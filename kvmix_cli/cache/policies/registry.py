"""Names of scores: what a plan's `tokens.score` and `channels.score` may say."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ...errors import PlanError, did_you_mean

T = TypeVar("T")


class Registry(dict[str, T]):
    """Scores by name. Register one of your own before the cache is made.

    Args:
        what: for errors, e.g. `token score`.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that makes a score known by a name."""

        def add(score: T) -> T:
            self[name] = score
            return score

        return add

    def find(self, name: str) -> T:
        """The score of a name. Raises PlanError with the nearest names."""
        if name not in self:
            known = ", ".join(sorted(self))
            raise PlanError(f"unknown {self._what} '{name}'{did_you_mean(name, self)}; there are {known}")
        return self[name]
