"""The number of exact tokens beside transform codes: of those that a profile has measured, the one that loses least."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import BudgetError
from ..profile import Profile
from .budgets import Budget
from .options import EXACT, AllocationOptions, default_exact, default_score, make_problem
from .problem import Decision, Problem


def best_exact(
    profile: Profile, budget: Budget, method: str, solve: Callable[[Problem], Decision], options: AllocationOptions
) -> int:
    """Return the number of exact tokens of a page with which the plan of a budget loses least.

    Under a limit of loss it is the number that takes the fewest stored bits. Nominal bits do not count exact tokens:
    under a limit of these, plans are compared in the stored bits that `EXACT` tokens lead to.

    Args:
        profile: scores of the model; `default_exact` is returned if none of it has measured numbers to choose from.
        solve: decides the problems of this method.
        options: see `AllocationOptions`; `exact` is left aside.

    Raises:
        BudgetError, DocumentError, PlanError: as `allocate`.
    """

    def problem(limit: Budget, exact: int) -> Problem:
        asked: AllocationOptions = {**options, "exact": exact}
        return make_problem(profile, limit, method, **asked)

    score = profile.score(options.get("score") or default_score(profile, method))
    coded = score.coded
    if not coded or score.is_for_engines:
        return default_exact(score)
    if budget.avg_bits is not None:
        decision = solve(problem(budget, EXACT))
        stored = problem(Budget(stored_bits=budget.avg_bits), EXACT)
        bits = stored.budget.bits(stored.cost({**decision, **stored.pins}), stored.cache, stored.model)
        budget = Budget(stored_bits=bits, context=budget.context)
    found: dict[int, tuple[float, float]] = {}
    for exact in sorted({each.exact for each in coded}):
        asked = problem(budget, exact)
        try:
            decision = solve(asked)
        except BudgetError:
            continue
        loss, cost = asked.loss(decision), asked.cost(decision)
        found[exact] = (loss, cost) if budget.max_loss is None else (cost, loss)
    return min(found, key=lambda exact: found[exact], default=EXACT)
