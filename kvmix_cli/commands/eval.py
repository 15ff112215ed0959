"""`kvmix eval`: measure plans against the unquantized cache, or methods against each other (`boards`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from .. import console, state
from ..errors import EvaluationError
from ..ranks import current
from .boards import hold_leaderboard, hold_systems, leave, saved, warn
from .dry_run import show_work
from .eval_options import BoardOptions, EvalOptions, TaskOptions
from .options import (
    COMMAND_LINE,
    CommonOptions,
    LoadingOptions,
    ModelOptions,
    expand,
    given,
    refuse,
    say_unused,
    was_given,
)

if TYPE_CHECKING:
    from ..evaluation.base import Task
    from ..evaluation.gates import GateOutcome
    from ..evaluation.results import Report
    from ..plan import ModelInfo
    from ..studies.measure import Results, Setup, SubjectNames
    from ..studies.selection import Choice

GATE_FAILED = 3
READ_BY_SOME = ("length", "prefix", "step", "text")
"""Settings that some tasks have no use for."""


@expand
def evaluate(
    ctx: typer.Context,
    work: EvalOptions,
    of_tasks: TaskOptions,
    board: BoardOptions,
    which: ModelOptions,
    loading: LoadingOptions,
    common: CommonOptions,
) -> None:
    """Measure plans through the quantized cache, beside the unquantized one on the same tokens.

    With --leaderboard: every score and solver, transform codes, the paper's rule, uniform and random plans, at equal
    stored bits. With --systems: every preset, scaled to the same stored bytes, and combinations of them.
    """
    if work.join and current().world > 1:
        raise EvaluationError("--join is for processes that were started apart: leave it out, or torchrun")
    own = given(asdict(of_tasks))
    if len(work.lengths) > 1:
        one = {"contexts": of_tasks.contexts, "leaderboard": board.leaderboard, "systems": board.systems}
        refuse(one, "does not go with several --length")
        _check_several(work)
        own["contexts"] = work.lengths
    if board.leaderboard or board.systems:
        _hold_board(board, work, own, _setup(ctx, work, which, loading))
        return
    refuse(board.rules, "needs --leaderboard")
    _say_unread(ctx, work.task, own)
    from ..studies.measure import SubjectNames

    names = SubjectNames(work.plan or [], work.preset or [], work.uniform or [], work.baseline or [], work.encode)
    choice, gates = names.choose(which.model, which.revision, console.notice), work.fail_if or []
    setup = _setup(ctx, work, which, loading)
    if work.dry_run:
        from ..studies.dry_run import evaluation_work

        show_work("eval", evaluation_work(choice, names, setup, own, gates))
    else:
        _measure(choice, names, setup, own, gates)


def _hold_board(board: BoardOptions, work: EvalOptions, own: dict[str, Any], setup: Setup) -> None:
    """Hold the leaderboard that is asked for. Raises typer.BadParameter for options that it does not have."""
    others = {**work.of_plans, "dry_run": work.dry_run}
    if board.leaderboard:
        refuse({**others, **own, "systems": board.systems}, "has no place in a leaderboard")
        hold_leaderboard(board, setup)
    else:
        refuse({**others, "preset": None, **board.of_scores}, "does not go with --systems")
        hold_systems(board, work.preset or [], own, setup)


def _say_unread(ctx: typer.Context, names: str | None, own: Mapping[str, Any]) -> None:
    """Say which settings were given that none of the tasks named has a use for."""
    if not was_given(ctx, *READ_BY_SOME):
        return
    from ..evaluation import get_task, split_tasks

    tasks = [get_task(name) for name in split_tasks(names or "perplexity")]
    unread = set.intersection(*({*task.unread} for task in tasks)) & {*READ_BY_SOME}
    if "contexts" in own and all("contexts" in task.options() or "length" in task.unread for task in tasks):
        unread.add("length")
    say_unused(ctx, sorted(unread), f"is not for {', '.join(task.name for task in tasks)}")


def _check_several(work: EvalOptions) -> None:
    """Raise EvaluationError for several lengths where a task takes one."""
    from ..evaluation import get_task, split_tasks
    from ..evaluation.base import Settings

    for name in split_tasks(work.task or "perplexity"):
        task = get_task(name)
        if "contexts" not in task.options() and task.context(Settings()) is not None:
            said = f"several --length are for tasks with contexts of their own, which {name} is not; give one"
            raise EvaluationError(said)


def _setup(ctx: typer.Context, work: EvalOptions, which: ModelOptions, loading: LoadingOptions) -> Setup:
    from ..evaluation.base import Settings
    from ..studies.measure import Loading, Results, Setup

    return Setup(
        which.model,
        work.task,
        Settings(work.lengths[-1], work.prefix, work.step, work.limit, work.text, loading.seed, work.prefill_chunk),
        Loading(
            revision=which.revision,
            dtype=loading.dtype,
            device=loading.device,
            trust_remote_code=loading.trust_remote_code,
            allow_pickle=loading.allow_pickle,
            tensor_parallel=work.tensor_parallel,
        ),
        Results(
            root=work.output_dir,
            resume=work.resume or work.join,
            command=ctx.meta[COMMAND_LINE],
            may_begin=work.join,
            is_shared=work.join,
        ),
    )


def _measure(choice: Choice, names: SubjectNames, setup: Setup, options: dict[str, Any], gates: Sequence[str]) -> None:
    """Measure, show each task's results as soon as they are there, and leave with the exit code of the outcome."""
    from ..reporting.tables.evaluation import evaluation_json
    from ..studies.measure import measure_plans

    evaluation = measure_plans(
        choice,
        names,
        setup,
        options,
        gates,
        say=console.notice,
        progress=console.progress,
        on_report=lambda task, report, model: _show(task, report, model, setup.results),
    )
    if not current().leads:  # whose exit code says how it went
        return
    with saved(setup.results["root"]):
        for verdict in evaluation.verdicts:
            _show_verdict(verdict)
        console.emit_json(evaluation_json(evaluation))
    if not evaluation.passed:
        raise typer.Exit(GATE_FAILED)
    leave(evaluation.reports)


def _show(task: Task, report: Report, model: ModelInfo, results: Results) -> None:
    """Show one task's tables, and a picture beside the samples if the task's values have a place in their contexts."""
    from ..evaluation.runs import RunFolders
    from ..reporting.tables.evaluation import report_tables

    if not current().leads:
        return
    warn(report)
    with saved(results["root"]):
        for table in report_tables(task, report, model):
            console.table(*table)
    if any("answers" in record for row in report.rows for record in row.records):
        from ..reporting.plots.heat_map import plot_heat_maps

        path = RunFolders(model=state.slug(model.id), **results).picture(
            report.task, [(row.plan, row.records) for row in report.rows]
        )
        with saved(results["root"]):
            is_drawn = plot_heat_maps(report, path)
        if is_drawn:
            console.text(f"picture: {path}\n\n")


def _show_verdict(verdict: GateOutcome) -> None:
    console.text(f"gate {verdict.expression}: {'passed' if verdict.passed else 'FAILED'}\n")
    for failure in verdict.failures:
        console.text(f"  {failure}\n")
        if console.mode.json:
            console.alert(f"gate {verdict.expression} failed: {failure}")
