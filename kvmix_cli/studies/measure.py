"""Measuring plans against the unquantized cache on the same work, and showing what came of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from .. import console, state
from ..errors import OutputError
from ..plan.sizes import format_bytes

if TYPE_CHECKING:
    from ..cache.subject import Subject
    from ..evaluation.base import Settings, Task
    from ..evaluation.gates import Gate, Verdict
    from ..evaluation.results import Estimate, Metric, Report, Row
    from ..evaluation.runs import RunFolders
    from ..models.loading import LoadedModel
    from ..plan import ModelInfo, Plan

GATE_FAILED = 3
ROW_FAILED = 1
MAX_COLUMNS = 10
"""A table with more is turned: a line a metric, a column a plan."""


class Setup(NamedTuple):
    """What is measured, and with what.

    Attributes:
        model: None for the one that the plans or the profile are for.
        tasks: their names, as one text; None for the default.
        loading: see `load_model`.
        results: where records go, see `RunFolders`.
    """

    model: str | None
    tasks: str | None
    settings: Settings
    loading: dict[str, Any]
    results: dict[str, Any]


class Contest(NamedTuple):
    """Who is measured: plans, presets, the same width everywhere, and other people's caches."""

    plans: Sequence[str]
    presets: Sequence[str]
    uniform: Sequence[int]
    baselines: Sequence[str]


def measure_plans(setup: Setup, contest: Contest, options: dict[str, Any], fail_if: Sequence[str]) -> None:
    """Measure the plans given, or the newest, and leave with the exit code that the outcome deserves.

    Args:
        options: of single tasks, those that were given.

    Raises:
        KvmixError: before anything is measured if it cannot be.
    """
    from ..evaluation import get_tasks, split_tasks
    from ..evaluation.runs import RunFolders
    from ..models.loading import load_info, load_model
    from .baselines import check_baselines
    from .selection import choose

    tasks = get_tasks(split_tasks("perplexity" if setup.tasks is None else setup.tasks), options)
    gates = _gates(fail_if, tasks)
    check_baselines(contest.baselines)
    need_plan = not (contest.presets or contest.uniform or contest.baselines)
    given = {"model": setup.model, "revision": setup.loading["revision"]}
    choice = choose(contest.plans, contest.presets, need_plan=need_plan, **given)
    loading = {**setup.loading, "revision": choice.revision}
    info = load_info(choice.model, revision=choice.revision, trust_remote_code=loading["trust_remote_code"])
    plans = choice.plans(info, contest.uniform)
    loaded = load_model(choice.model, **loading)
    subjects = _subjects(plans, contest.baselines, loaded, setup.settings.seed)
    runs = RunFolders(model=state.slug(choice.model), **setup.results)
    reports = [_report(task, loaded, subjects, setup.settings, runs) for task in tasks]
    verdicts = [
        gate.check(_judged(report, plans), report.reference)
        for gate in gates
        for task, report in zip(tasks, reports, strict=True)
        if any(metric.name == gate.metric for metric in task.metrics)
    ]
    _show_gates(verdicts)
    console.emit_json(_as_json(loaded.info, reports, verdicts))
    leave(reports, verdicts)


def _judged(report: Report, plans: Collection[str]) -> list[Row]:
    """The rows that gates are about: those of the user's plans, or of the baselines if there is nothing else."""
    return [row for row in report.plans if row.plan in plans] or list(report.plans)


def _gates(expressions: Sequence[str], tasks: Sequence[Task]) -> list[Gate]:
    """Raises EvaluationError before anything is measured if a gate makes no sense."""
    from ..evaluation.gates import parse_gate

    metrics = [metric for task in tasks for metric in task.metrics]
    known, relative = [m.name for m in metrics], [m.name for m in metrics if not m.plans_only]
    return [parse_gate(expression, known, relative) for expression in expressions]


def _subjects(plans: dict[str, Plan], baselines: Sequence[str], loaded: LoadedModel, seed: int) -> list[Subject]:
    from ..cache.subject import Subject
    from .baselines import baseline_subjects

    ours = [Subject(name, plan) for name, plan in plans.items()]
    return [*ours, *baseline_subjects(baselines, loaded, plans, seed)]


def _report(
    task: Task, loaded: LoadedModel, subjects: Sequence[Subject], settings: Settings, runs: RunFolders
) -> Report:
    """Run one task and show it at once, so that a later task's failure does not take it away."""
    from ..evaluation.runner import run_task

    report = run_task(task, loaded, subjects, settings, runs, console.progress)
    warn(report)
    metrics = [metric for metric in task.metrics if any(metric.name in row.metrics for row in report.rows)]
    columns = ("plan", "nominal", "stored", "quantized", *(metric.name.replace("_", " ") for metric in metrics))
    table: list[Sequence[str]] = [columns, *(_cells(row, metrics) for row in report.rows)]
    if len(columns) > max(MAX_COLUMNS, len(table)):
        table = list(zip(*table, strict=True))
    console.table(f"{task.name} of {loaded.info.id}", table[0], table[1:], f"{report.description}\n")
    for each in task.details(report.rows):
        console.table(*each)
    _draw(report, runs)
    return report


def _draw(report: Report, runs: RunFolders) -> None:
    """A picture beside the samples, if the task's values have a place in their contexts."""
    if any("answers" in record for row in report.rows for record in row.records):
        from ..reporting.heat_map import plot_heat_maps

        path = runs.picture(report.task)
        try:
            drawn = plot_heat_maps(report, path)
        except OutputError as error:
            raise OutputError(f"{error}; all samples and rows are saved: --resume draws the picture") from error
        if drawn:
            console.text(f"picture: {path}\n\n")


def warn(report: Report) -> None:
    """What must be said about a report, even to a quiet user."""
    for warning in (*report.warnings, *(warning for row in report.rows for warning in row.warnings)):
        console.alert(f"warning: {warning}")
    for row in report.rows:
        if row.error is not None:
            console.alert(f"{row.plan} could not be measured: {row.error}")


def _cells(row: Row, metrics: Sequence[Metric]) -> list[str]:
    """A row of the table; what was not measured is a dash."""
    stored = "-" if row.stored_bits is None else f"{row.stored_bits:.2f}"
    cells = [row.plan, f"{row.nominal_bits:.2f}", stored, f"{row.quantized_share:.1%}"]
    return cells + [cell(row.metrics.get(metric.name), metric.unit) for metric in metrics]


def cell(estimate: Estimate | None, unit: str) -> str:
    """`13.25 [12.10, 14.31]`; without an interval where there is none."""
    if estimate is None:
        return "-"
    value, low, high = (_number(number, unit) for number in (estimate.value, estimate.low, estimate.high))
    return value if estimate.low == estimate.high else f"{value} [{low}, {high}]"


def _number(value: float, unit: str) -> str:
    if unit == "bytes":
        return format_bytes(value)
    if unit == "%":
        return f"{round(value, 2) + 0.0:+.2f} %"
    return f"{round(value, 4) + 0.0:+.4f}" if unit == "nats" else f"{value:.4g}" + ("x" if unit == "x" else "")


def _show_gates(verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        console.text(f"gate {verdict.expression}: {'passed' if verdict.passed else 'FAILED'}\n")
        for failure in verdict.failures:
            console.text(f"  {failure}\n")
            if console.mode.json:
                console.alert(f"gate {verdict.expression} failed: {failure}")


def _as_json(info: ModelInfo, reports: Sequence[Report], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "command": "eval",
        "model": info.id,
        "task": ",".join(report.task for report in reports),
        "tokens": sum(report.tokens for report in reports),
        "rows": [row.as_json() for report in reports for row in report.rows],
        "reference": reports[0].reference.plan,
        "gates": [
            {"expression": verdict.expression, "passed": verdict.passed, "failures": list(verdict.failures)}
            for verdict in verdicts
        ],
    }


def leave(reports: Sequence[Report], verdicts: Sequence[Verdict] = ()) -> None:
    """With the exit code that the outcome deserves."""
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(GATE_FAILED)
    if any(row.error is not None for report in reports for row in report.rows):
        raise typer.Exit(ROW_FAILED)
