"""The leaderboard: every different plan is measured once, and plans are put in the order of their losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...allocation import TRANSFORM, TRANSFORM_SCORE, default_score, predicted_loss
from ...counting import counted
from ...errors import DocumentError, EvaluationError
from ...plan import CacheSettings, GroupSize, Plan
from ...plan.document.strict_yaml import reason
from ...plan.windows import parse_window
from ...profile import Profile
from ...state import PLANS
from ..directions import read_basis, with_basis
from .candidates import PAPER, RANDOM, UNIFORM, CandidatePlan, Omission, candidates, make_plans
from .standings import Comparison, Standing, compare, rank_correlation

if TYPE_CHECKING:
    from ...evaluation.base import Settings
    from ...evaluation.results import Report
    from ...evaluation.runner import Progress
    from ...evaluation.runs import RunFolders
    from ...models.loading import LoadedModel

TASKS = ("perplexity", "recall")
NAME_LENGTH = 12
"""Characters of a plan's checksum that name its runs, so that the same plan is never measured twice."""


@dataclass(frozen=True)
class Board:
    """Results of a leaderboard.

    Attributes:
        champion: name of the candidate that the comparisons are about.
        standings: plans by budget, each budget from the lowest measured loss.
        reports: everything that was measured, one report for each task.
        comparisons: the champion beside the paper's rule, uniform widths and the best random plan, at each budget; if
            it is transform codes, beside the best other solver, too.
        correlations: by score, Spearman's correlation of predicted and measured loss, and the number of plans.
        left_out: candidates without a plan at a budget.
    """

    champion: str
    standings: list[Standing]
    reports: list[Report]
    comparisons: list[Comparison]
    correlations: dict[str, tuple[float | None, int]]
    left_out: list[Omission]


def hold(
    profile: Profile,
    load: Callable[[], LoadedModel],
    *,
    folder: Path | None = None,
    tasks: Sequence[str] = TASKS,
    settings: Settings | None = None,
    runs: RunFolders | None = None,
    stored_bits: Sequence[float] = (2.5, 3, 3.5, 4),
    scores: Sequence[str] = (),
    methods: Sequence[str] = (),
    random_plans: int = 8,
    group_sizes: Sequence[GroupSize] = (),
    progress: Progress | None = None,
) -> Board:
    """Measure the plans of all candidates at every budget.

    Args:
        profile: scores of the model.
        load: function that loads the model; called once, after all plans were made.
        folder: folder of the profile's file, with its moments; None for no transform codes. Their basis is written
            beside the profile's plans.
        tasks: names of evaluation tasks; perplexity must be one of them.
        settings: documents to measure on, and how.
        runs: folder where records are kept and resumed; None keeps none.
        stored_bits: budgets.
        scores, methods, random_plans: see `candidates`.
        group_sizes: see `make_plans`.
        progress: progress bar, see `evaluation.runner.Progress`.

    Raises:
        DocumentError, BudgetError, EvaluationError, PlanError: before anything is measured, for options that do not
            fit the profile or that no candidate can meet.
        KvmixError: if the model cannot be loaded or measured.
    """
    from ...evaluation.base import Settings

    settings = settings or Settings()
    entrants, champion = candidates(profile, scores, methods, random_plans)
    is_coded = folder is not None and any(each.method == TRANSFORM for each in entrants)
    basis = read_basis(profile, folder) if is_coded and folder is not None else None
    plans, left_out = make_plans(profile, entrants, stored_bits, measured_settings(profile), group_sizes, basis)
    if basis is not None and folder is not None:
        plans = [replace(each, plan=with_basis(each.plan, basis, folder / PLANS)) for each in plans]
    check_tasks(tasks)
    loaded = load()
    plans[0].plan.check_model(loaded.info)
    reports = measure(plans, loaded, tasks, settings, runs, progress)
    standings = rank(plans, reports, profile)
    predicting = [name for name in profile.scores if any(name in each.predicted for each in standings)]
    return Board(
        champion=champion,
        standings=standings,
        reports=reports,
        comparisons=_comparisons(standings, champion, settings.seed),
        correlations={score: rank_correlation(standings, score) for score in predicting},
        left_out=left_out,
    )


def check_tasks(names: Sequence[str]) -> None:
    """Raise EvaluationError for a task that does not exist, or a list without perplexity."""
    from ...evaluation import check_names

    if "perplexity" not in names:
        raise EvaluationError(f"a leaderboard is in the order of perplexity, got {','.join(names)}: add it to --task")
    check_names(names)


def measured_settings(profile: Profile) -> CacheSettings:
    """Return the cache settings that curves were measured with, as far as the profile has them.

    Raises:
        DocumentError: if they are no valid settings.
    """
    setup = profile.score(default_score(profile, "ilp")).setup
    window = {"window": parse_window(setup["window"])} if "window" in setup else {}
    try:
        return CacheSettings.model_validate({**setup, **window})
    except ValueError as error:
        raise DocumentError(f"profile of {profile.model.id}", [f"setup: {reason(error)}"]) from error


def measure(
    plans: Sequence[CandidatePlan],
    loaded: LoadedModel,
    names: Sequence[str],
    settings: Settings,
    runs: RunFolders | None,
    progress: Progress | None,
    options: Mapping[str, Any] | None = None,
) -> list[Report]:
    """Measure every different plan with every task, under one progress bar.

    Args:
        names: names of evaluation tasks.
        options: options of single tasks.
    """
    from ...cache.subject import Subject
    from ...evaluation import get_task
    from ...evaluation.runner import no_progress, run_tasks

    by_name = {each.plan.sha256[:NAME_LENGTH]: each.plan for each in plans}
    subjects = [Subject(name, plan) for name, plan in by_name.items()]
    tasks = [get_task(name, options) for name in names]
    steps = (1 + len(subjects)) * sum(task.limit(settings) for task in tasks)
    with (progress or no_progress)(counted(len(by_name), "plan"), steps) as bar:
        return run_tasks(tasks, loaded, subjects, settings, runs, lambda title, total: nullcontext(bar))


def rank(plans: Sequence[CandidatePlan], reports: Sequence[Report], profile: Profile | None = None) -> list[Standing]:
    """Return one standing for each budget and different plan; plans that could not be measured come last.

    Args:
        reports: measurements of the plans.
        profile: scores that predict losses; None for no predictions.
    """
    rows = {(report.task, row.plan): row for report in reports for row in report.plans}
    alike: dict[tuple[float, str], list[CandidatePlan]] = {}
    for each in plans:
        alike.setdefault((each.stored_bits, each.plan.sha256[:NAME_LENGTH]), []).append(each)
    found = []
    for (stored_bits, name), group in alike.items():
        plan = group[0].plan
        losses = {} if profile is None else _predictions(plan, profile)
        predicted = {score: loss for score, loss in losses.items() if loss is not None}
        own = {report.task: rows[report.task, name] for report in reports}
        found.append(Standing(stored_bits, tuple(each.name for each in group), plan, own, predicted))
    return sorted(found, key=lambda each: (each.stored_bits, each.loss.value if each.loss else float("inf")))


def _predictions(plan: Plan, profile: Profile) -> dict[str, float | None]:
    losses = {score: predicted_loss(plan, each) for score, each in profile.scores.items()}
    if plan.cache.transform is not None:
        losses[TRANSFORM_SCORE] = plan.provenance.get("predicted_loss")
    return losses


def _comparisons(standings: Sequence[Standing], champion: str, seed: int) -> list[Comparison]:
    found: list[Comparison | None] = []
    for stored_bits in dict.fromkeys(each.stored_bits for each in standings):
        named = {name: each for each in standings if each.stored_bits == stored_bits for name in each.names}
        best_random = next((name for name in named if name.startswith(RANDOM)), None)
        controls = (PAPER, UNIFORM, best_random)
        solvers = [name for name in named if name not in (champion, PAPER, UNIFORM) and not name.startswith(RANDOM)]
        wanted = (*solvers[:1], *controls) if champion == TRANSFORM else controls
        rivals = [name for name in wanted if name in named and name != champion]
        if champion in named:
            found += [compare((champion, named[champion]), (rival, named[rival]), seed) for rival in rivals]
    return [comparison for comparison in found if comparison is not None]
