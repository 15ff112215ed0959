"""Methods of allocation, one file each with a pure function; a method is loaded when it is first used."""

from __future__ import annotations

from ...errors import BudgetError
from ...registry import Registry
from ..problem import Method

TRANSFORM = "transform"
"""The method that gives bits to directions."""
SOLVERS = ("rank", "ilp", "cut", "uniform", "random", TRANSFORM)
"""Methods that decide one plan from a profile and a budget."""
FAMILY, SEARCH = "pareto", "search"
"""Methods that make plans along the whole range of budgets, and that measure plans."""
METHODS: Registry[Method] = Registry(
    "method", BudgetError, __name__, {name: f"{name}:METHOD" for name in (*SOLVERS, FAMILY, SEARCH)}
)
