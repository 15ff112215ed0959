"""Holding a leaderboard: the field is measured, each plan once, and put in order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ... import console, state
from ...errors import DocumentError, EvaluationError
from .field import PAPER, RANDOM, UNIFORM, Absence, Entry, Field, Rules, assemble

if TYPE_CHECKING:
    from ...evaluation.results import Report
    from ...models.loading import LoadedModel
    from ...plan import CacheSettings, GroupSize
    from ...profile import Profile
    from ..measure import Setup
    from .compare import Comparison, Standing

NAME = 12
"""Characters of a plan's SHA-256 that name its runs: the same plan is never measured twice."""


@dataclass(frozen=True)
class Board:
    """What came of it: standings by budget and then from the lowest measured loss, and what follows from them.

    Attributes:
        correlations: by score, Spearman's correlation of predicted and measured loss, and over how many plans.
    """

    champion: str
    standings: list[Standing]
    reports: list[Report]
    comparisons: list[Comparison]
    correlations: dict[str, tuple[float | None, int]]
    left_out: list[Absence]


def hold(
    setup: Setup,
    *,
    stored_bits: Sequence[float] = (2.5, 3, 3.5, 4),
    scores: Sequence[str] = (),
    methods: Sequence[str] = (),
    random_plans: int = 8,
    group_size: Sequence[GroupSize] = (),
    profile: Path | None = None,
) -> None:
    """Measure the whole field, show it, and leave a table and a picture of it beside the records.

    Raises:
        KvmixError: before anything is measured if it cannot be.
    """
    from ...commands.eval import leave
    from ...files import write_text
    from ...profile import Profile
    from ...reporting.leaderboard import board_json, markdown, tables
    from ...reporting.leaderboard_plot import plot_board
    from ...reporting.plots import check_plot

    found = Profile.load(state.find_profile(profile, model=setup.model))
    rules = Rules(stored_bits, scores, methods, random_plans, _cache(found), group_size)
    page, picture = (Path(setup.results["root"]) / f"leaderboard{suffix}" for suffix in (".md", ".png"))
    field = assemble(found, rules)
    check_plot(picture)
    board = _measure(field, found, setup)
    shown = tables(board)
    for table in shown:
        console.table(*table)
    write_text(page, markdown(shown, setup.results["command"]))
    plot_board(board, picture)
    console.text(f"tables:  {page}\npicture: {picture}\n")
    head = {"command": "eval", "model": found.model.id, "task": ",".join(_tasks(setup))}
    console.emit_json({**head, **board_json(board), "page": page, "plot": picture})
    leave(board.reports)


def _tasks(setup: Setup) -> Sequence[str]:
    from ...evaluation import split_tasks

    return split_tasks("perplexity,recall" if setup.tasks is None else setup.tasks)


def _cache(profile: Profile) -> CacheSettings:
    """The settings that curves were measured with, where they say so. Raises DocumentError if they make no sense."""
    from ...allocation import default_score
    from ...plan import CacheSettings
    from ...plan.document import reason
    from ...plan.windows import parse_window

    setup = dict(profile.score(default_score(profile, "ilp")).setup)
    if "window" in setup:
        setup["window"] = parse_window(str(setup["window"]))
    try:
        return CacheSettings.model_validate(setup)
    except ValueError as error:
        raise DocumentError(f"profile of {profile.model.id}", [f"setup: {reason(error)}"]) from error


def _measure(field: Field, profile: Profile, setup: Setup) -> Board:
    from ...models.loading import load_model
    from .compare import rank_correlation

    if "perplexity" not in _tasks(setup):
        raise EvaluationError("a leaderboard is in the order of perplexity: add it to --task")
    loaded = load_model(profile.model.id, **setup.loading)
    field.entries[0].plan.check_model(loaded.info)
    reports = _run(field.entries, loaded, setup)
    standings = _standings(field.entries, profile, reports)
    predicting = [name for name, score in profile.scores.items() if score.predicts_loss]
    return Board(
        champion=field.champion,
        standings=standings,
        reports=reports,
        comparisons=_comparisons(standings, field.champion, setup.settings.seed),
        correlations={score: rank_correlation(standings, score) for score in predicting},
        left_out=field.left_out,
    )


def _run(entries: Sequence[Entry], loaded: LoadedModel, setup: Setup) -> list[Report]:
    """Every different plan through every task, under one bar."""
    from ...cache.subject import Subject
    from ...commands.eval import warn
    from ...evaluation import get_task
    from ...evaluation.runner import run_task
    from ...evaluation.runs import Runs

    plans = {entry.plan.sha256[:NAME]: entry.plan for entry in entries}
    subjects = [Subject(name, plan) for name, plan in plans.items()]
    tasks = [get_task(name) for name in _tasks(setup)]
    runs = Runs(model=state.slug(loaded.info.id), **setup.results)
    steps = (1 + len(subjects)) * sum(task.limit(setup.settings) for task in tasks)
    with console.progress(f"{len(plans)} plans", steps) as bar:
        reports = [
            run_task(task, loaded, subjects, setup.settings, runs, lambda title, total: nullcontext(bar))
            for task in tasks
        ]
    for report in reports:
        warn(report)
    return reports


def _standings(entries: Sequence[Entry], profile: Profile, reports: Sequence[Report]) -> list[Standing]:
    """One for each budget and different plan; those that could not be measured come last."""
    from ...allocation import predicted_loss
    from .compare import Standing

    rows = {(report.task, row.plan): row for report in reports for row in report.plans}
    alike: dict[tuple[float, str], list[Entry]] = {}
    for entry in entries:
        alike.setdefault((entry.stored_bits, entry.plan.sha256[:NAME]), []).append(entry)
    found = []
    for (stored_bits, name), group in alike.items():
        plan = group[0].plan
        foretold = {score: predicted_loss(plan, each) for score, each in profile.scores.items()}
        predicted = {score: loss for score, loss in foretold.items() if loss is not None}
        own = {report.task: rows[report.task, name] for report in reports}
        found.append(Standing(stored_bits, tuple(entry.name for entry in group), plan, own, predicted))
    return sorted(found, key=lambda each: (each.stored_bits, each.loss.value if each.loss else float("inf")))


def _comparisons(standings: Sequence[Standing], champion: str, seed: int) -> list[Comparison]:
    """At every budget the champion against the paper's rule, uniform, and the best of the random plans."""
    from .compare import compare

    found: list[Comparison | None] = []
    for stored_bits in dict.fromkeys(each.stored_bits for each in standings):
        named = {name: each for each in standings if each.stored_bits == stored_bits for name in each.names}
        best_random = next((name for name in named if name.startswith(RANDOM)), None)
        rivals = [name for name in (PAPER, UNIFORM, best_random) if name in named and name != champion]
        if champion in named:
            found += [compare((champion, named[champion]), (rival, named[rival]), seed) for rival in rivals]
    return [comparison for comparison in found if comparison is not None]
