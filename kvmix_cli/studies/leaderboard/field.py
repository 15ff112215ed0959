"""Who takes part: every score with every solver that decides by one, the paper's rule, uniform and random plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

from ...errors import BudgetError, EvaluationError

if TYPE_CHECKING:
    from ...plan import CacheSettings, GroupSize, Plan
    from ...profile import Profile

PAPER, UNIFORM, RANDOM = "paper", "uniform", "random"
PAPER_RULE = ("rank", "grad-norm")


@dataclass(frozen=True)
class Contestant:
    """A way to decide; see `allocate`."""

    name: str
    method: str
    score: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Entry:
    """A contestant's plan at one budget."""

    stored_bits: float
    name: str
    plan: Plan


@dataclass(frozen=True)
class Absence:
    """A contestant who has no plan at a budget, and why."""

    stored_bits: float
    name: str
    reason: str


@dataclass(frozen=True)
class Field:
    """All who take part.

    Attributes:
        champion: the name that is compared with the paper's rule, uniform and the best random plan.
    """

    champion: str
    entries: list[Entry] = field(default_factory=list)
    left_out: list[Absence] = field(default_factory=list)


@dataclass(frozen=True)
class Rules:
    """Who may take part.

    Attributes:
        scores, methods: empty for all that there are.
        cache: of all plans.
        group_sizes: to choose from, for methods that do; the first is everybody's. Empty for the cache's own.
    """

    stored_bits: Sequence[float]
    scores: Sequence[str]
    methods: Sequence[str]
    random_plans: int
    cache: CacheSettings
    group_sizes: Sequence[GroupSize]


def assemble(profile: Profile, rules: Rules) -> Field:
    """Every plan that takes part.

    Raises:
        DocumentError, BudgetError, EvaluationError: for a score or method that is unknown or does not fit, or if no
            budget can be met.
    """
    methods, scores = _methods(rules.methods), rules.scores or tuple(profile.scores)
    for score in scores:
        profile.score(score)
    found = Field(_champion(profile, methods, scores))
    contestants = list(_contestants(profile, methods, scores, rules.random_plans))
    for stored_bits in rules.stored_bits:
        for contestant in contestants:
            try:
                plan = _plan(profile, stored_bits, contestant, rules)
                found.entries.append(Entry(stored_bits, contestant.name, plan))
            except BudgetError as error:
                found.left_out.append(Absence(stored_bits, contestant.name, str(error)))
    if not found.entries:
        raise EvaluationError(f"nobody can take part: {found.left_out[0].reason}")
    return found


def _plan(profile: Profile, stored_bits: float, contestant: Contestant, rules: Rules) -> Plan:
    from ...allocation import Budget, allocate

    return allocate(
        profile,
        Budget(stored_bits=stored_bits),
        method=contestant.method,
        score=contestant.score,
        seed=contestant.seed,
        group_sizes=rules.group_sizes,
        cache=rules.cache,
    )


def _contestants(
    profile: Profile, methods: Sequence[str], scores: Sequence[str], random_plans: int
) -> Iterator[Contestant]:
    if PAPER_RULE[1] in profile.scores:
        yield Contestant(PAPER, *PAPER_RULE)
    for method, score in product(methods, scores):
        if (method, score) != PAPER_RULE:
            yield Contestant(f"{method} {score}", method, score)
    yield Contestant(UNIFORM, UNIFORM)
    for seed in range(random_plans):
        yield Contestant(f"{RANDOM} {seed}", RANDOM, seed=seed)


def _methods(given: Sequence[str]) -> Sequence[str]:
    """Solvers that decide by a score: those given, or all."""
    from ...allocation import SOLVERS, get_method

    known = [name for name in SOLVERS if "score" in get_method(name).uses]
    if wrong := [name for name in given if name not in known]:
        raise EvaluationError(f"'{wrong[0]}' decides by no score; a leaderboard has {', '.join(known)}")
    return given or known


def _champion(profile: Profile, methods: Sequence[str], scores: Sequence[str]) -> str:
    """The exact solver if it takes part, with the score that knows most."""
    from ...allocation import default_score

    method = "ilp" if "ilp" in methods else methods[-1]
    score = default_score(profile, method)
    pair = (method, score if score in scores else scores[0])
    return PAPER if pair == PAPER_RULE else " ".join(pair)
