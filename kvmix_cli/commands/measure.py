"""Measuring plans against the unquantized cache on the same work, and showing what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from .. import console, state

if TYPE_CHECKING:
    from ..evaluation.base import Estimate, Metric, Settings, Subject, Task
    from ..evaluation.gates import Gate, Verdict
    from ..evaluation.report import Report, Row
    from ..evaluation.runs import Runs
    from ..models import LoadedModel
    from ..plan import ModelInfo, Plan

GATE_FAILED = 3
ROW_FAILED = 1
KIB = 2**10


class Setup(NamedTuple):
    """What is measured, and with what.

    Attributes:
        model: None for the one that the plans or the profile are for.
        tasks: their names; None for the default.
        loading: see `load_model`.
        results: where records go, see `Runs`.
    """

    model: str | None
    tasks: Sequence[str] | None
    settings: Settings
    loading: dict[str, Any]
    results: dict[str, Any]


def measure_plans(setup: Setup, given: Sequence[str], uniform: Sequence[int], fail_if: Sequence[str]) -> None:
    """Measure the plans given, or the newest, and leave with the exit code that the outcome deserves.

    Raises:
        KvmixError: before anything is measured if it cannot be.
    """
    from ..evaluation import get_task
    from ..evaluation.runs import Runs
    from ..models import load_info, load_model
    from .subjects import choose

    names = setup.tasks or ("perplexity",)
    tasks = [get_task(name) for name in names]
    gates = _gates(fail_if, tasks)
    choice = choose(given, model=setup.model, revision=setup.loading["revision"], need_plan=not uniform)
    loading = {**setup.loading, "revision": choice.revision}
    info = load_info(choice.model, revision=choice.revision, trust_remote_code=loading["trust_remote_code"])
    subjects = _subjects(choice.plans(info, uniform))
    loaded = load_model(choice.model, **loading)
    runs = Runs(model=state.slug(choice.model), **setup.results)
    reports = [_report(task, loaded, subjects, setup.settings, runs) for task in tasks]
    verdicts = [gate.check(report.plans, report.reference) for gate, report in _paired(gates, reports)]
    _show_gates(verdicts)
    console.emit_json(_as_json(loaded.info, ",".join(names), reports, verdicts))
    leave(reports, verdicts)


def _gates(expressions: Sequence[str], tasks: Sequence[Task]) -> list[Gate]:
    """Raises EvaluationError before anything is measured if a gate makes no sense."""
    from ..evaluation.gates import parse_gate

    metrics = [metric for task in tasks for metric in task.metrics]
    known, relative = [m.name for m in metrics], [m.name for m in metrics if not m.plans_only]
    return [parse_gate(expression, known, relative) for expression in expressions]


def _subjects(plans: dict[str, Plan]) -> list[Subject]:
    from ..evaluation.base import Subject

    return [Subject(name, plan) for name, plan in plans.items()]


def _report(task: Task, loaded: LoadedModel, subjects: Sequence[Subject], settings: Settings, runs: Runs) -> Report:
    """Run one task and show it at once, so that a later task's failure does not take it away."""
    from ..evaluation.runner import run_task

    report = run_task(task, loaded, subjects, settings, runs, console.progress)
    warn(report)
    metrics = [metric for metric in task.metrics if any(metric.name in row.metrics for row in report.rows)]
    columns = ("plan", "nominal", "stored", "quantized", *(metric.name.replace("_", " ") for metric in metrics))
    rows = [_cells(row, metrics) for row in report.rows]
    console.table(f"{task.name} of {loaded.info.id}", columns, rows, f"{report.description}\n")
    return report


def warn(report: Report) -> None:
    """What must be said about a report, even to a quiet user."""
    for warning in (*report.warnings, *(warning for row in report.rows for warning in row.warnings)):
        console.alert(f"warning: {warning}")
    for row in report.rows:
        if row.error is not None:
            console.alert(f"{row.plan} could not be measured: {row.error}")


def _cells(row: Row, metrics: Sequence[Metric]) -> list[str]:
    """A row of the table; what was not measured is a dash."""
    cells = [row.plan, f"{row.nominal_bits:.2f}", f"{row.stored_bits:.2f}", f"{row.quantized_share:.1%}"]
    return cells + [cell(row.metrics.get(metric.name), metric.unit) for metric in metrics]


def cell(estimate: Estimate | None, unit: str) -> str:
    """`13.25 [12.10, 14.31]`; without an interval where there is none."""
    if estimate is None:
        return "-"
    value, low, high = (_number(number, unit) for number in (estimate.value, estimate.low, estimate.high))
    return value if estimate.low == estimate.high else f"{value} [{low}, {high}]"


def _number(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / KIB:.1f} KiB"
    if unit == "%":
        return f"{value:+.2f} %"
    return f"{value:+.4f}" if unit == "nats" else f"{value:.4g}" + ("x" if unit == "x" else "")


def _paired(gates: Sequence[Gate], reports: Sequence[Report]) -> Iterator[tuple[Gate, Report]]:
    """Each gate with the report of the task that has its metric."""
    from ..evaluation import get_task

    for gate in gates:
        for report in reports:
            if any(metric.name == gate.metric for metric in get_task(report.task).metrics):
                yield gate, report


def _show_gates(verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        console.text(f"gate {verdict.expression}: {'passed' if verdict.passed else 'FAILED'}\n")
        for failure in verdict.failures:
            console.text(f"  {failure}\n")
            if console.mode.json:
                console.alert(f"gate {verdict.expression} failed: {failure}")


def _as_json(info: ModelInfo, task: str, reports: Sequence[Report], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "command": "eval",
        "model": info.id,
        "task": task,
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
