"""`kvmix eval`: measure plans against the unquantized cache on the same work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console, state
from . import options

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


def evaluate(
    ctx: typer.Context,
    task: Annotated[str, typer.Option(metavar="NAME,...", help="perplexity, recall, memory.")] = "perplexity",
    plan: Annotated[
        list[str] | None,
        typer.Option(metavar="PLAN", help="File, name or short form '0-3:k4v4,...' [default: the newest]; repeatable."),
    ] = None,
    uniform: Annotated[
        list[int] | None, typer.Option(metavar="BITS", help="The same width everywhere; repeatable.")
    ] = None,
    length: Annotated[int, typer.Option(metavar="N", help="Tokens of a document, exercise or context.")] = 1024,
    prefix: Annotated[int, typer.Option(metavar="N", help="Of these, prefilled before scoring (perplexity).")] = 256,
    step: Annotated[int, typer.Option(metavar="N", help="Tokens fed at a time; 1 is exact decoding.")] = 32,
    text: Annotated[
        str, typer.Option(metavar="SOURCE", help="builtin (held out), a file, a folder or hub:DATASET.")
    ] = "builtin",
    limit: Annotated[int | None, typer.Option(metavar="N", help="Most samples [default: the task's].")] = None,
    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where every sample is kept.")] = Path("results"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted evaluation.")] = False,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(metavar="GATE", help="Exit with 3 if it holds, such as 'perplexity>+1%' or 'recall<0.8'."),
    ] = None,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    profiles_dir: options.ProfilesDir = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure plans through the quantized cache, beside the unquantized one on the same tokens."""
    from ..evaluation import get_task
    from ..evaluation.base import Settings
    from ..evaluation.runs import Runs
    from ..models import load_info, load_model
    from .subjects import choose

    chosen_tasks = [get_task(name) for name in dict.fromkeys(part.strip() for part in task.split(","))]
    gates = _gates(fail_if or [], chosen_tasks)
    settings = Settings(length=length, prefix=prefix, step=step, limit=limit, text=text, seed=seed)
    settings.check(None)
    choice = choose(plan or [], model=model, revision=revision, need_plan=not uniform)
    source: dict[str, Any] = {"revision": choice.revision, "trust_remote_code": trust_remote_code}
    subjects = _subjects(choice.plans(load_info(choice.model, **source), uniform or []))
    loaded = load_model(choice.model, dtype=dtype, device=device, **source)
    runs = Runs(output_dir, state.slug(choice.model), resume, ctx.meta[options.COMMAND_LINE])
    reports = [_report(each, loaded, subjects, settings, runs) for each in chosen_tasks]
    verdicts = [gate.check(report.plans, report.reference) for gate, report in _paired(gates, reports)]
    _show_gates(verdicts)
    console.emit_json(_as_json(loaded.info, task, reports, verdicts))
    _leave(reports, verdicts)


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
    for warning in (*report.warnings, *(warning for row in report.rows for warning in row.warnings)):
        console.alert(f"warning: {warning}")
    for row in report.rows:
        if row.error is not None:
            console.alert(f"{row.plan} could not be measured: {row.error}")
    metrics = [metric for metric in task.metrics if any(metric.name in row.metrics for row in report.rows)]
    columns = ("plan", "nominal", "stored", "quantized", *(metric.name.replace("_", " ") for metric in metrics))
    rows = [_cells(row, metrics) for row in report.rows]
    console.table(f"{task.name} of {loaded.info.id}", columns, rows, f"{report.description}\n")
    return report


def _cells(row: Row, metrics: Sequence[Metric]) -> list[str]:
    """A row of the table; what was not measured is a dash."""
    cells = [row.plan, f"{row.nominal_bits:.2f}", f"{row.stored_bits:.2f}", f"{row.quantized_share:.1%}"]
    return cells + [_cell(row.metrics.get(metric.name), metric.unit) for metric in metrics]


def _cell(estimate: Estimate | None, unit: str) -> str:
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


def _leave(reports: Sequence[Report], verdicts: Sequence[Verdict]) -> None:
    """With the exit code that the outcome deserves."""
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(GATE_FAILED)
    if any(row.error is not None for report in reports for row in report.rows):
        raise typer.Exit(ROW_FAILED)
