"""The methods by name, and which score each decides by if none is named. A method is loaded when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from ...errors import BudgetError, did_you_mean
from ...profile import Profile

SOLVERS = ("rank", "ilp", "cut", "uniform", "random")
"""Methods that need no more than a profile and a budget, and decide one plan."""
FAMILY, SEARCH = "pareto", "search"
TRIALS = 40
"""Plans that `search` measures by default."""
SCORES = ("fisher", "kl", "loss", "taylor", "error", "grad-norm")
"""In the order of preference: `fisher` predicts as well as `kl`, and knows all widths and groups."""
PAPER_SCORE = "grad-norm"


class Method(NamedTuple):
    """A way to decide, and which of the problem's `score`, `seed` and `group_sizes` it depends on."""

    solve: Callable[..., Any]
    uses: tuple[str, ...]


def methods() -> list[str]:
    """Names of all methods."""
    return [*SOLVERS, FAMILY, SEARCH]


def get_method(name: str) -> Method:
    """A method by name. Raises BudgetError for an unknown one."""
    if name not in methods():
        hint = did_you_mean(name, methods()) or f"; there are {', '.join(methods())}"
        raise BudgetError(f"unknown method '{name}'{hint}")
    module = importlib.import_module(f".{name}", __name__)
    return Method(module.solve, module.USES)


def default_method(profile: Profile) -> str:
    """The exact solver if a score knows what widths do, otherwise the paper's rule."""
    return "ilp" if any(any(score.choices) for score in profile.scores.values()) else "rank"


def default_score(profile: Profile, method: str) -> str:
    """The score that a method decides by: for `rank` the paper's if there is one, otherwise the first of `SCORES`."""
    wanted = (PAPER_SCORE, *SCORES) if method == "rank" else SCORES
    return next((name for name in wanted if name in profile.scores), next(iter(profile.scores)))
