"""From the options of a call to a problem: defaults, ladders cut to size, pins, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from ..errors import BudgetError
from ..plan import WIDTHS, CacheSettings, GroupSize, LayerPlan
from ..plan.document import reason
from ..profile import Profile
from .budgets import Budget
from .problem import Problem
from .solvers import default_score, get_method

K_BITS = (2, 3, 4, 8)
V_BITS = (2, 4, 8)
"""Up to 3.5 bits the paper's ladders, which then go on. Methods that weigh choices have `K_BITS` for both."""


class Options(TypedDict, total=False):
    """What every way to allocate can be told.

    Attributes:
        k_bits, v_bits: widths to choose from; by default `K_BITS` and, for methods that weigh no choices, `V_BITS`.
        min_bits, max_bits: of these, the narrowest and the widest to use.
        group_sizes: to choose from. The first is the cache's own, and the only one for methods that do not choose.
        cache: settings of the plan.
        score: which of the profile's scores to use; by default what `default_score` says.
        pins: layers that are decided already; their cost is taken off the budget.
        seed: of methods that draw at random.
    """

    k_bits: Sequence[int] | None
    v_bits: Sequence[int] | None
    min_bits: int | None
    max_bits: int | None
    group_sizes: Sequence[GroupSize] | None
    cache: CacheSettings | None
    score: str | None
    pins: Mapping[int, LayerPlan] | None
    seed: int


def pose(
    profile: Profile,
    budget: Budget,
    method: str,
    *,
    k_bits: Sequence[int] | None = None,
    v_bits: Sequence[int] | None = None,
    min_bits: int | None = None,
    max_bits: int | None = None,
    group_sizes: Sequence[GroupSize] | None = None,
    cache: CacheSettings | None = None,
    score: str | None = None,
    pins: Mapping[int, LayerPlan] | None = None,
    seed: int = 0,
) -> Problem:
    """The problem that a method is asked to solve.

    Raises:
        BudgetError: if the options leave nothing to choose from, or the score cannot predict what the budget limits.
        DocumentError: if the profile has no such score.
        PlanError: if the model's heads cannot be packed.
    """
    cache = cache or CacheSettings()
    weighs = "group_sizes" in get_method(method).uses
    sizes = tuple(dict.fromkeys(group_sizes or (cache.group_size,)))
    problem = Problem(
        profile=profile,
        score_name=score or default_score(profile, method),
        budget=budget,
        cache=_grouped(cache, sizes)[0],
        k_bits=_ladder("k_bits", K_BITS if k_bits is None else k_bits, min_bits, max_bits),
        v_bits=_ladder("v_bits", (K_BITS if weighs else V_BITS) if v_bits is None else v_bits, min_bits, max_bits),
        group_sizes=sizes if weighs else sizes[:1],
        pins=dict(pins or {}),
        seed=seed,
    )
    if budget.max_loss is not None and not problem.score.predicts_loss:
        raise _no_prediction(profile, problem.score_name)
    return problem


def _ladder(name: str, widths: Sequence[int], least: int | None, most: int | None) -> tuple[int, ...]:
    """Ascending, without repetition, and within the bounds."""
    if not widths or any(bits not in WIDTHS for bits in widths):
        known = ", ".join(map(str, WIDTHS))
        raise BudgetError(f"{name} must be taken from {known}, got {', '.join(map(str, widths)) or 'nothing'}")
    ladder = sorted(set(widths))
    low, high = least or ladder[0], most or ladder[-1]
    if kept := tuple(bits for bits in ladder if low <= bits <= high):
        return kept
    bounds = f"{low} to {high} bits: widen --min-bits and --max-bits"
    raise BudgetError(f"{name} {', '.join(map(str, ladder))} have none of {bounds}")


def _grouped(cache: CacheSettings, sizes: Sequence[GroupSize]) -> list[CacheSettings]:
    """The settings with each group size. Raises BudgetError for one that cannot be."""
    try:
        return [CacheSettings.model_validate({**cache.model_dump(), "group_size": size}) for size in sizes]
    except ValueError as error:
        raise BudgetError(reason(error)) from error


def _no_prediction(profile: Profile, score: str) -> BudgetError:
    able = [name for name, each in profile.scores.items() if each.predicts_loss]
    hint = f"use --score {' or '.join(able)}" if able else "measure one that does with `kvmix profile MODEL --score kl`"
    return BudgetError(f"score '{score}' does not predict a loss, so it cannot keep to --max-loss: {hint}")
