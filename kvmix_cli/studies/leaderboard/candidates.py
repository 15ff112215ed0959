"""Candidates of a leaderboard: every solver with every score, transform codes, the paper's rule, and controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ...allocation import METHODS, SOLVERS, TRANSFORM, Budget, allocate, default_score
from ...errors import BudgetError, EvaluationError
from ...plan import CacheSettings, GroupSize, Plan
from ...plan.tensors.basis import BasisFile
from ...profile import Profile
from ..directions import has_directions

PAPER, UNIFORM, RANDOM = "paper", "uniform", "random"
PAPER_RULE = ("rank", "grad-norm")


@dataclass(frozen=True)
class Candidate:
    """A way to decide, by its name in the leaderboard; see `allocation.allocate`."""

    name: str
    method: str
    score: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class CandidatePlan:
    """A candidate's plan at one budget of stored bits."""

    stored_bits: float
    name: str
    plan: Plan


@dataclass(frozen=True)
class Omission:
    """A candidate that has no plan at a budget of stored bits, with the reason."""

    stored_bits: float
    name: str
    reason: str


def candidates(
    profile: Profile, scores: Sequence[str] = (), methods: Sequence[str] = (), random_plans: int = 8
) -> tuple[list[Candidate], str]:
    """Return all candidates, and the name of the one that is compared with the paper's rule and the controls.

    Args:
        profile: scores of the model.
        scores: scores to use; all of the profile's if empty.
        methods: solvers to use; if empty all that use a score, and transform codes where the profile has directions.
        random_plans: number of random plans.

    Raises:
        DocumentError: if the profile has no such score.
        EvaluationError: if a method is none of a leaderboard.
    """
    scores, methods = scores or tuple(profile.scores), methods or _default_methods(profile)
    _check_methods(methods)
    for score in scores:
        profile.score(score)
    return list(_candidates(profile, methods, scores, random_plans)), _champion(profile, methods, scores)


def make_plans(
    profile: Profile,
    entrants: Sequence[Candidate],
    stored_bits: Sequence[float],
    cache: CacheSettings,
    group_sizes: Sequence[GroupSize] = (),
    basis: BasisFile | None = None,
) -> tuple[list[CandidatePlan], list[Omission]]:
    """Return the plan of every candidate at every budget, and the candidates that have none.

    Args:
        profile: scores of the model.
        entrants: the candidates.
        stored_bits: budgets.
        cache: settings of all plans.
        group_sizes: group sizes to choose from, the first for methods that do not; empty for the cache's own.
        basis: directions of the layers, for transform codes.

    Raises:
        EvaluationError: if no candidate has a plan at any budget.
        BudgetError, PlanError: as `allocation.allocate`.
    """
    plans: list[CandidatePlan] = []
    left_out: list[Omission] = []
    for bits, candidate in product(stored_bits, entrants):
        try:
            plan = allocate(
                profile,
                Budget(stored_bits=bits),
                method=candidate.method,
                score=candidate.score,
                seed=candidate.seed,
                group_sizes=group_sizes,
                cache=cache,
                basis=basis,
            )
            plans.append(CandidatePlan(bits, candidate.name, plan))
        except BudgetError as error:
            left_out.append(Omission(bits, candidate.name, str(error)))
    if not plans:
        raise EvaluationError(f"no method has a plan at these budgets: {left_out[0].reason}")
    return plans, left_out


def _candidates(
    profile: Profile, methods: Sequence[str], scores: Sequence[str], random_plans: int
) -> Iterator[Candidate]:
    if PAPER_RULE[1] in profile.scores:
        yield Candidate(PAPER, *PAPER_RULE)
    for method, score in product(_scored(methods), scores):
        if (method, score) != PAPER_RULE:
            yield Candidate(f"{method} {score}", method, score)
    if TRANSFORM in methods:
        yield Candidate(TRANSFORM, TRANSFORM)
    yield Candidate(UNIFORM, UNIFORM)
    for seed in range(random_plans):
        yield Candidate(f"{RANDOM} {seed}", RANDOM, seed=seed)


def _scored(methods: Sequence[str]) -> list[str]:
    return [name for name in methods if "score" in METHODS[name].uses]


def _default_methods(profile: Profile) -> list[str]:
    return [*_scored(SOLVERS), *([TRANSFORM] if has_directions(profile) else [])]


def _check_methods(methods: Sequence[str]) -> None:
    known = [*_scored(SOLVERS), TRANSFORM]
    if wrong := [name for name in methods if name not in known]:
        raise EvaluationError(f"method '{wrong[0]}' has no place in a leaderboard; it compares {', '.join(known)}")


def _champion(profile: Profile, methods: Sequence[str], scores: Sequence[str]) -> str:
    """Return transform codes if they are a candidate, or else the exact solver if it is one, with the best score."""
    if TRANSFORM in methods:
        return TRANSFORM
    method = "ilp" if "ilp" in methods else methods[-1]
    score = default_score(profile, method)
    pair = (method, score if score in scores else scores[0])
    return PAPER if pair == PAPER_RULE else " ".join(pair)
