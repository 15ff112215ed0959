"""Allocation: from scores to plans under a budget, without torch.

Three functions, with the methods that each takes:

    allocate(profile, Budget(avg_bits=2.3)) -> Plan                       rank, ilp, cut, uniform, random, transform
    frontier(profile) -> list[Plan]                                       pareto
    refine(profile, Budget(stored_bits=3), measure) -> Plan               search
"""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from .._version import __version__
from ..errors import BudgetError
from ..plan import Plan
from ..plan.engine_blocks import METRIC_WINDOW
from ..plan.plan import Provenance
from ..profile import Profile
from .bases import SCORE as TRANSFORM_SCORE
from .bases import make_bases
from .budgets import Budget
from .correction import predicted_context
from .curves import other_settings, predicted_loss
from .exact import best_exact
from .heads import SURE, with_budgets, with_whole_heads
from .options import (
    EXACT,
    K_BITS,
    V_BITS,
    AllocationOptions,
    Start,
    default_cache,
    default_method,
    default_score,
    make_problem,
    preset_start,
)
from .pins import parse_pins
from .problem import Decision, Measure, Method, Problem
from .solvers import FAMILY, METHODS, SEARCH, SOLVERS, TRANSFORM

TRIALS = 40
"""Plans that `refine` measures by default."""

__all__ = [
    "EXACT",
    "FAMILY",
    "K_BITS",
    "METHODS",
    "SEARCH",
    "SOLVERS",
    "SURE",
    "TRANSFORM",
    "TRANSFORM_SCORE",
    "TRIALS",
    "V_BITS",
    "AllocationOptions",
    "Budget",
    "Decision",
    "Measure",
    "Method",
    "Problem",
    "Start",
    "allocate",
    "default_cache",
    "default_method",
    "default_score",
    "frontier",
    "make_bases",
    "other_settings",
    "parse_pins",
    "predicted_loss",
    "preset_start",
    "refine",
    "with_budgets",
    "with_whole_heads",
]


def allocate(
    profile: Profile, budget: Budget, *, method: str | None = None, **options: Unpack[AllocationOptions]
) -> Plan:
    """Decide how every layer's keys and values are stored.

    Args:
        profile: scores of the model.
        budget: limit that the plan must keep to.
        method: one of `SOLVERS`; by default `default_method`.
        options: see `AllocationOptions`.

    Raises:
        BudgetError: if no plan meets the budget; the message has the reachable range.
        DocumentError: if the profile has no such score.
        PlanError: if the model's heads cannot be packed.
    """
    method = method or default_method(profile)
    solve = METHODS[method].solve
    if solve is None:
        reason = "takes no budget" if method == FAMILY else "has to measure plans"
        raise BudgetError(f"method '{method}' {reason}; one plan from a budget: {', '.join(SOLVERS)}")
    if method == TRANSFORM and options.get("exact") is None:
        options["exact"] = best_exact(profile, budget, method, solve, options)
    problem = make_problem(profile, budget, method, **options)
    return _plan(problem, method, solve(problem), {})


def frontier(profile: Profile, **options: Unpack[AllocationOptions]) -> list[Plan]:
    """Return plans along the whole range of stored bits, ascending, each with less predicted loss than the one before.

    Raises:
        BudgetError, DocumentError, PlanError: as `allocate`.
    """
    from .solvers.pareto import solve_range

    problem = make_problem(profile, Budget(), FAMILY, **options)
    return [_plan(problem, FAMILY, decision, {"budget": budget.summary}) for budget, decision in solve_range(problem)]


def refine(
    profile: Profile, budget: Budget, measure: Measure, *, trials: int = TRIALS, **options: Unpack[AllocationOptions]
) -> Plan:
    """Decide by the measured loss of whole plans.

    Args:
        profile: scores of the model, which decide the order of the trials.
        budget: limit that the plan must keep to.
        measure: function that returns the loss of a plan's layers.
        trials: most plans to measure.
        options: see `AllocationOptions`.

    Raises:
        BudgetError, DocumentError, PlanError: as `allocate`.
    """
    from .solvers.search import solve_by_measuring

    problem = make_problem(profile, budget, SEARCH, **options)
    found = solve_by_measuring(problem, measure, trials)
    return _plan(problem, SEARCH, found.decision, {"trials": found.trials, "measured_loss": found.loss})


def _plan(problem: Problem, method: str, decision: Decision, found: Provenance) -> Plan:
    """Return the whole plan, with its pins and with everything needed to make it again."""
    layers = dict(sorted({**decision, **problem.pins}.items()))
    uses = METHODS[method].uses
    predicts = problem.score.predicts_loss or ("basis" in uses and not problem.pins)
    predicted = problem.curves.total(layers) if predicts and not problem.evictions else None
    provenance: dict[str, Any] = {
        "kvmix": __version__,
        "method": method,
        "score": problem.score_name if "score" in uses or predicted is not None else None,
        "seed": problem.seed if "seed" in uses else None,
        "group_sizes": list(problem.group_sizes) if "group_sizes" in uses else None,
        "code_bits": None if problem.code_bits is None else list(problem.code_bits),
        "evict": list(problem.evictions) or None,
        "by_head": "widths" if problem.by_head else None,
        "budget": problem.budget.summary,
        "pins": {layer: pin.short for layer, pin in problem.pins.items()} or None,
        "predicted_loss": predicted,
        "predicted_context": predicted_context(problem.score, problem.budget.context)
        if "basis" in uses and predicted is not None
        else None,
        METRIC_WINDOW: problem.score.setup.get("window") if "basis" in uses else None,
        **found,
        "profile_sha256": problem.profile_sha256,
    }
    known = {name: value for name, value in provenance.items() if value is not None}
    return Plan.build(problem.model, layers, problem.cache, known)
