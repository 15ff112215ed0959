"""From scores to plans under a budget. One file a method, each with a pure `solve(problem)`; no torch.

allocate(profile, Budget(avg_bits=2.3)) -> Plan                       rank, ilp, cut, uniform, random
frontier(profile) -> list[Plan]                                       pareto
refine(profile, Budget(stored_bits=3), measure) -> Plan               search
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import BudgetError
from ..plan import Plan
from ..plan.pins import parse_pins
from ..profile import Profile
from .budgets import Budget
from .pose import K_BITS, V_BITS, Options, pose
from .predict import other_settings, predicted_loss
from .presets import PRESETS, Preset
from .problem import Decision, Measure, Problem
from .solvers import FAMILY, SEARCH, SOLVERS, TRIALS, Method, default_method, default_score, get_method, methods

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "FAMILY",
    "K_BITS",
    "PRESETS",
    "SEARCH",
    "SOLVERS",
    "TRIALS",
    "V_BITS",
    "Budget",
    "Decision",
    "Measure",
    "Method",
    "Options",
    "Preset",
    "Problem",
    "allocate",
    "default_method",
    "default_score",
    "frontier",
    "get_method",
    "methods",
    "other_settings",
    "parse_pins",
    "predicted_loss",
    "refine",
]


def allocate(profile: Profile, budget: Budget, *, method: str | None = None, **options: Unpack[Options]) -> Plan:
    """Decide how every layer's keys and values are stored.

    Args:
        method: one of `SOLVERS`; by default what `default_method` says.
        options: see `Options`.

    Raises:
        BudgetError: if no plan meets the budget; the message has the reachable range.
        DocumentError: if the profile has no such score.
        PlanError: if the model's heads cannot be packed.
    """
    method = method or default_method(profile)
    chosen = get_method(method)
    if method not in SOLVERS:
        needed = "takes no budget" if method == FAMILY else "has to measure plans"
        raise BudgetError(f"method '{method}' {needed}; one plan from a budget: {', '.join(SOLVERS)}")
    problem = pose(profile, budget, method, **options)
    return _plan(problem, method, chosen.solve(problem))


def frontier(profile: Profile, **options: Unpack[Options]) -> list[Plan]:
    """Plans along the whole range of stored bits, ascending, none worse than a smaller one.

    Raises:
        BudgetError, DocumentError, PlanError: as `allocate`.
    """
    problem = pose(profile, Budget(), FAMILY, **options)
    family = get_method(FAMILY).solve(problem)
    return [_plan(problem, FAMILY, decision, budget=budget.summary) for budget, decision in family]


def refine(
    profile: Profile, budget: Budget, measure: Measure, *, trials: int = TRIALS, **options: Unpack[Options]
) -> Plan:
    """Decide by what `measure` says of whole plans, at most `trials` of them.

    Raises:
        BudgetError, DocumentError, PlanError: as `allocate`.
    """
    problem = pose(profile, budget, SEARCH, **options)
    found = get_method(SEARCH).solve(problem, measure, trials)
    return _plan(problem, SEARCH, found.decision, trials=found.trials, measured_loss=found.loss)


def _plan(problem: Problem, method: str, decision: Decision, **found: Any) -> Plan:
    """The whole plan, pins and all, with what it takes to make it again."""
    layers = dict(sorted({**decision, **problem.pins}.items()))
    predicted = problem.curves.total(layers) if problem.score.predicts_loss else None
    uses = get_method(method).uses
    provenance = {
        "kvmix": __version__,
        "method": method,
        "score": problem.score_name if "score" in uses or predicted is not None else None,
        "seed": problem.seed if "seed" in uses else None,
        "group_sizes": list(problem.group_sizes) if "group_sizes" in uses else None,
        "budget": problem.budget.summary,
        "pins": {layer: pin.short for layer, pin in problem.pins.items()} or None,
        "predicted_loss": predicted,
        **found,
        "profile_sha256": problem.profile_sha256,
    }
    known = {name: value for name, value in provenance.items() if value is not None}
    return Plan.build(problem.model, layers, problem.cache, known)
