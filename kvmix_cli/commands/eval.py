"""`kvmix eval`: measure plans against the unquantized cache, or (`--leaderboard`) methods against each other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console, state
from ..errors import EvaluationError
from .options import (
    COMMAND_LINE,
    CommonOptions,
    Encoding,
    LoadingOptions,
    ModelOptions,
    count_option,
    expand,
    given,
    parse_batch,
    parse_budgets,
    parse_bytes,
    parse_count,
    parse_counts,
    parse_groups,
    parse_names,
    refuse,
)

if TYPE_CHECKING:
    from ..evaluation.base import Task
    from ..evaluation.gates import GateOutcome
    from ..evaluation.results import Report
    from ..models.loading import LoadedModel
    from ..plan import ModelInfo
    from ..profile import Profile
    from ..studies.measure import Results, Setup, SubjectNames
    from ..studies.selection import Choice

PROMPTS = "Tasks that generate: LongBench and lm-eval"
SWEEPS = "Sweeps: throughput, recall and needles"
BOARD = "Leaderboard"
ROW_FAILED = 1
GATE_FAILED = 3


def _parse_length(text: str) -> int | tuple[int, ...]:
    """Return a length, or the lengths of a list, `4K,16K`."""
    return parse_counts(text) if "," in text else parse_count(text)


@dataclass(frozen=True)
class EvalOptions:
    """The subjects to measure, the text to measure them on, and the folder of the results."""

    task: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="perplexity [the default], long-context (recall, passkey, kv_retrieval, multi_hop, code_completion), "
            "memory, throughput, longbench[:NAME,...], longbench-e, longctx_bench, or any task of lm-eval.",
        ),
    ] = None
    plan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLAN",
            help="File, name or short form '0-3:k4v4,...' [default: the newest], or PLAN+PRESET; repeatable.",
        ),
    ] = None
    preset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A published method, such as mikv or kvtuner:FILE, without a plan; repeatable."
        ),
    ] = None
    uniform: Annotated[
        list[int] | None, typer.Option(metavar="BITS", help="The same width everywhere; repeatable.")
    ] = None
    encode: Encoding = None
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Somebody else's cache beside ours: bf16, fp8, hf-fp8, hf-quanto-{2,4}, hf-hqq-{1,2,3,4,8}, or "
            "all of these; uniform-N, random-plan[-SEED]; repeatable.",
        ),
    ] = None
    length: Annotated[
        Any,
        typer.Option(
            metavar="N", parser=_parse_length, help="Tokens of a document or context; several for tasks of --contexts."
        ),
    ] = "1024"
    prefix: Annotated[int, count_option("Of these, prefilled before scoring (perplexity).", least=None)] = 256
    step: Annotated[int, count_option("Tokens fed at a time; 1 is exact decoding.", least=None)] = 32
    prefill_chunk: Annotated[
        int | None, count_option("Tokens prefilled at a time, each packed before the next [default: all].", least=None)
    ] = None
    text: Annotated[
        str,
        typer.Option(metavar="SOURCE", help="builtin (held out), wikitext2, c4, a file, a folder or hub:DATASET."),
    ] = "builtin"
    limit: Annotated[int | None, count_option("Most samples [default: the task's].", least=None)] = None
    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where every sample is kept.")] = Path("results")
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted evaluation.")] = False
    fail_if: Annotated[
        list[str] | None,
        typer.Option(metavar="GATE", help="Exit with 3 if it holds, such as 'perplexity>+1%' or 'recall<0.8'."),
    ] = None

    def __post_init__(self) -> None:
        """Raise EvaluationError for a number out of its range."""
        for name in ("length", "prefix", "step", "limit", "prefill_chunk"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise EvaluationError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.encode and not self.uniform:
            raise EvaluationError("--encode is for --uniform; a plan file has `encode` in its cache section")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return all lengths, ascending."""
        return self.length if isinstance(self.length, tuple) else (self.length,)

    @property
    def of_plans(self) -> dict[str, Any]:
        """Return the options that name what is measured, and the gates that judge it."""
        names = ("plan", "preset", "uniform", "encode", "baseline", "fail_if")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class TaskOptions:
    """Options of single tasks; each is refused where no task has it."""

    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=PROMPTS, help="LongBench's JSONL files [default: from the hub]."),
    ] = None
    max_length: Annotated[
        int | None, count_option("Most tokens of a prompt [default: the model's limit].", rich_help_panel=PROMPTS)
    ] = None
    strict: Annotated[
        bool, typer.Option("--strict", rich_help_panel=PROMPTS, help="A malformed line is an error, not skipped.")
    ] = False
    batch_size: Annotated[
        Any,
        typer.Option(metavar="N", parser=parse_batch, rich_help_panel=PROMPTS, help="Prompts at a time, or auto."),
    ] = None
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", rich_help_panel=PROMPTS, help="Task files of your own, for lm-eval.")
    ] = None
    num_fewshot: Annotated[
        int | None, count_option("Examples in a prompt of lm-eval.", least=0, rich_help_panel=PROMPTS)
    ] = None
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", rich_help_panel=PROMPTS, help="Also for tasks of lm-eval.")
    ] = False
    contexts: Annotated[
        Any,
        typer.Option(metavar="LIST", parser=parse_counts, rich_help_panel=SWEEPS, help="Tokens, e.g. 1024,4096."),
    ] = None
    batches: Annotated[
        Any, typer.Option(metavar="LIST", parser=parse_counts, rich_help_panel=SWEEPS, help="E.g. 1,8.")
    ] = None
    new_tokens: Annotated[
        int | None, count_option("Tokens to decode (throughput).", least=2, rich_help_panel=SWEEPS)
    ] = None
    repeats: Annotated[int | None, count_option("Times each point is measured.", rich_help_panel=SWEEPS)] = None
    memory: Annotated[
        Any,
        typer.Option(
            metavar="SIZE", parser=parse_bytes, rich_help_panel=SWEEPS, help="Find the largest batch within it."
        ),
    ] = None
    depths: Annotated[int | None, count_option("Places of a needle in its context.", rich_help_panel=SWEEPS)] = None
    hops: Annotated[
        int | None, count_option("Names that a number is handed on to (multi_hop).", rich_help_panel=SWEEPS)
    ] = None


@dataclass(frozen=True)
class BoardOptions:
    """Options of a leaderboard, which are refused without one."""

    leaderboard: Annotated[
        bool, typer.Option("--leaderboard", rich_help_panel=BOARD, help="Compare methods instead of plans of your own.")
    ] = False
    stored_bits: Annotated[
        Any,
        typer.Option(metavar="LIST", parser=parse_budgets, rich_help_panel=BOARD, help="Budgets, e.g. 2.5,3,3.5,4."),
    ] = None
    scores: Annotated[
        Any, typer.Option(metavar="LIST", parser=parse_names, rich_help_panel=BOARD, help="Scores [default: all].")
    ] = None
    methods: Annotated[
        Any, typer.Option(metavar="LIST", parser=parse_names, rich_help_panel=BOARD, help="Solvers [default: all].")
    ] = None
    group_size: Annotated[
        Any,
        typer.Option(metavar="LIST", parser=parse_groups, rich_help_panel=BOARD, help="To choose from, e.g. 64,32."),
    ] = None
    random_plans: Annotated[
        int | None, count_option("Random plans a budget [default: 8].", least=0, rich_help_panel=BOARD)
    ] = None
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=BOARD, help="Profile to use [default: the newest]."),
    ] = None

    @property
    def rules(self) -> dict[str, Any]:
        """Return the options that were given, without `--leaderboard` itself."""
        return given({name: value for name, value in asdict(self).items() if name != "leaderboard"})


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
    stored bits.
    """
    own = given(asdict(of_tasks))
    if len(work.lengths) > 1:
        refuse({"contexts": of_tasks.contexts, "leaderboard": board.leaderboard}, "does not go with several --length")
        own["contexts"] = work.lengths
    if board.leaderboard:
        refuse({**work.of_plans, **own}, "has no place in a leaderboard")
    else:
        refuse(board.rules, "needs --leaderboard")
    from ..studies.measure import SubjectNames

    names = SubjectNames(work.plan or [], work.preset or [], work.uniform or [], work.baseline or [], work.encode)
    if board.leaderboard:
        _hold_leaderboard(board, _setup(ctx, work, which, loading))
    else:
        choice = names.choose(which.model, which.revision, console.notice)
        _measure(choice, names, _setup(ctx, work, which, loading), own, work.fail_if or [])


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
        ),
        Results(root=work.output_dir, resume=work.resume, command=ctx.meta[COMMAND_LINE]),
    )


def _hold_leaderboard(board: BoardOptions, setup: Setup) -> None:
    """Hold a leaderboard, show it, and leave a table and a plot of it beside the records."""
    from ..evaluation import split_tasks
    from ..evaluation.runs import RunFolders, short_checksum
    from ..files import check_writable, write_text
    from ..profile import Profile
    from ..reporting.leaderboard import board_json, plan_names, tables
    from ..reporting.markdown import markdown_document
    from ..reporting.plan_names import NAMES, names_text, read_names
    from ..studies.leaderboard import hold

    rules = board.rules
    path = state.find_profile(rules.pop("profile", None), model=setup.model, say=console.notice)
    profile = Profile.load(path)
    tasks = split_tasks("perplexity,recall" if setup.tasks is None else setup.tasks)
    root = setup.results["root"]
    check_writable(root / "leaderboard.png")
    found = hold(
        profile,
        lambda: _load(profile, setup),
        folder=path.parent,
        tasks=tasks,
        settings=setup.settings,
        runs=RunFolders(model=state.slug(profile.model.id), **setup.results),
        group_sizes=rules.pop("group_size", ()),
        progress=console.progress,
        **rules,
    )
    for report in found.reports:
        warn(report)
    shown = tables(found)
    from ..reporting.leaderboard_plot import plot_board

    page = root / f"leaderboard__{short_checksum(shown)}.md"
    picture = page.with_suffix(".png")
    with _saved(root):
        for table in shown:
            console.table(*table)
        write_text(page, markdown_document(shown, setup.results["command"]))
        write_text(root / NAMES, names_text({**read_names(root / NAMES), **plan_names(found)}))
        plot_board(found, picture)
        console.text(f"tables:  {page}\npicture: {picture}\n")
        head = {"command": "eval", "model": profile.model.id, "task": ",".join(tasks)}
        console.emit_json({**head, **board_json(found), "page": page, "plot": picture})
    leave(found.reports)


def _load(profile: Profile, setup: Setup) -> LoadedModel:
    from ..models.loading import load_model  # torch, after all options are checked

    return load_model(profile.model.id, **setup.loading)


def _measure(choice: Choice, names: SubjectNames, setup: Setup, options: dict[str, Any], gates: Sequence[str]) -> None:
    """Measure, show each task's results as soon as they are there, and leave with the exit code of the outcome."""
    from ..reporting.evaluation import evaluation_json
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
    with _saved(setup.results["root"]):
        for verdict in evaluation.verdicts:
            _show_verdict(verdict)
        console.emit_json(evaluation_json(evaluation))
    if not evaluation.passed:
        raise typer.Exit(GATE_FAILED)
    leave(evaluation.reports)


def _saved(root: Path) -> AbstractContextManager[None]:
    from ..files import after_saving

    return after_saving(f"all samples and rows are saved in {root}: the same command with --resume writes the rest")


def leave(reports: Sequence[Report]) -> None:
    """Leave with code 1 if a subject could not be measured."""
    if any(row.error is not None for report in reports for row in report.rows):
        raise typer.Exit(ROW_FAILED)


def warn(report: Report) -> None:
    """Show the lines about a report that even a quiet user must see."""
    from ..reporting.evaluation import report_warnings

    for line in report_warnings(report):
        console.alert(line)


def _show(task: Task, report: Report, model: ModelInfo, results: Results) -> None:
    """Show one task's tables, and a picture beside the samples if the task's values have a place in their contexts."""
    from ..evaluation.runs import RunFolders
    from ..reporting.evaluation import report_tables

    warn(report)
    with _saved(results["root"]):
        for table in report_tables(task, report, model):
            console.table(*table)
    if any("answers" in record for row in report.rows for record in row.records):
        from ..reporting.heat_map import plot_heat_maps

        path = RunFolders(model=state.slug(model.id), **results).picture(
            report.task, [(row.plan, row.records) for row in report.rows]
        )
        with _saved(results["root"]):
            is_drawn = plot_heat_maps(report, path)
        if is_drawn:
            console.text(f"picture: {path}\n\n")


def _show_verdict(verdict: GateOutcome) -> None:
    console.text(f"gate {verdict.expression}: {'passed' if verdict.passed else 'FAILED'}\n")
    for failure in verdict.failures:
        console.text(f"  {failure}\n")
        if console.mode.json:
            console.alert(f"gate {verdict.expression} failed: {failure}")
