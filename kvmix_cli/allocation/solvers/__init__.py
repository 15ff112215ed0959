"""Methods of allocation, one file each with a pure function; a method is loaded when it is first used."""

from __future__ import annotations

from ...errors import BudgetError
from ...registry import Registry
from ..problem import Method

SOLVERS = ("rank", "ilp", "cut", "uniform", "random")
"""Methods that decide one plan from a profile and a budget."""
FAMILY, SEARCH = "pareto", "search"
"""Methods that make plans along the whole range of budgets, and that measure plans."""
METHODS: Registry[Method] = Registry(
    "method", BudgetError, __name__, {name: f"{name}:METHOD" for name in (*SOLVERS, FAMILY, SEARCH)}
)
