"""`kvmix eval`: measure plans against the unquantized cache, or (`--leaderboard`) methods against each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options

if TYPE_CHECKING:
    from ..studies.measure import Setup

PROMPTS = "Tasks that generate: LongBench and lm-eval"
SWEEPS = "Sweeps: throughput, recall and needles"
BOARD = "Leaderboard"


def evaluate(
    ctx: typer.Context,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="perplexity [the default], recall, passkey, kv_retrieval, memory, throughput, longbench[:NAME,...], "
            "longbench-e, or any task of lm-eval.",
        ),
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLAN",
            help="File, name or short form '0-3:k4v4,...' [default: the newest], or PLAN+PRESET; repeatable.",
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A published method, such as mikv or kvtuner:FILE, without a plan; repeatable."
        ),
    ] = None,
    uniform: Annotated[
        list[int] | None, typer.Option(metavar="BITS", help="The same width everywhere; repeatable.")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Somebody else's cache beside ours: bf16, fp8, hf-fp8, hf-quanto-{2,4}, hf-hqq-{1,2,3,4,8}, or "
            "all of these; uniform-N, random-plan[-SEED]; repeatable.",
        ),
    ] = None,
    length: Annotated[int, typer.Option(metavar="N", help="Tokens of a document, exercise or context.")] = 1024,
    prefix: Annotated[int, typer.Option(metavar="N", help="Of these, prefilled before scoring (perplexity).")] = 256,
    step: Annotated[int, typer.Option(metavar="N", help="Tokens fed at a time; 1 is exact decoding.")] = 32,
    text: Annotated[
        str,
        typer.Option(metavar="SOURCE", help="builtin (held out), wikitext2, c4, a file, a folder or hub:DATASET."),
    ] = "builtin",
    limit: Annotated[int | None, typer.Option(metavar="N", help="Most samples [default: the task's].")] = None,
    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where every sample is kept.")] = Path("results"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted evaluation.")] = False,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(metavar="GATE", help="Exit with 3 if it holds, such as 'perplexity>+1%' or 'recall<0.8'."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=PROMPTS, help="LongBench's JSONL files [default: from the hub]."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, rich_help_panel=PROMPTS, help="Most tokens of a prompt [default: the model's limit]."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", rich_help_panel=PROMPTS, help="A malformed line is an error, not skipped.")
    ] = False,
    batch_size: Annotated[
        Any,
        typer.Option(
            metavar="N", parser=options.parse_batch, rich_help_panel=PROMPTS, help="Prompts at a time, or auto."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", rich_help_panel=PROMPTS, help="Task files of your own, for lm-eval.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(metavar="N", min=0, rich_help_panel=PROMPTS, help="Examples in a prompt of lm-eval.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", rich_help_panel=PROMPTS, help="Also for tasks of lm-eval.")
    ] = False,
    contexts: Annotated[
        Any,
        typer.Option(
            metavar="LIST", parser=options.parse_counts, rich_help_panel=SWEEPS, help="Tokens, e.g. 1024,4096."
        ),
    ] = None,
    batches: Annotated[
        Any,
        typer.Option(metavar="LIST", parser=options.parse_counts, rich_help_panel=SWEEPS, help="E.g. 1,8."),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=2, rich_help_panel=SWEEPS, help="Tokens to decode (throughput).")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(metavar="N", min=1, rich_help_panel=SWEEPS, help="Times each point is measured.")
    ] = None,
    memory: Annotated[
        Any,
        typer.Option(
            metavar="SIZE", parser=options.parse_bytes, rich_help_panel=SWEEPS, help="Find the largest batch within it."
        ),
    ] = None,
    depths: Annotated[
        int | None, typer.Option(metavar="N", min=1, rich_help_panel=SWEEPS, help="Places of a needle in its context.")
    ] = None,
    leaderboard: Annotated[
        bool, typer.Option("--leaderboard", rich_help_panel=BOARD, help="Compare methods instead of plans of your own.")
    ] = False,
    stored_bits: Annotated[
        Any,
        typer.Option(
            metavar="LIST", parser=options.parse_budgets, rich_help_panel=BOARD, help="Budgets, e.g. 2.5,3,3.5,4."
        ),
    ] = None,
    scores: Annotated[
        Any,
        typer.Option(metavar="LIST", parser=options.parse_names, rich_help_panel=BOARD, help="Scores [default: all]."),
    ] = None,
    methods: Annotated[
        Any,
        typer.Option(metavar="LIST", parser=options.parse_names, rich_help_panel=BOARD, help="Solvers [default: all]."),
    ] = None,
    group_size: Annotated[
        Any,
        typer.Option(
            metavar="LIST", parser=options.parse_groups, rich_help_panel=BOARD, help="To choose from, e.g. 64,32."
        ),
    ] = None,
    random_plans: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", rich_help_panel=BOARD, help="Random plans a budget [default: 8]."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=BOARD, help="Profile to use [default: the newest]."),
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
    """Measure plans through the quantized cache, beside the unquantized one on the same tokens.

    With --leaderboard: every score and solver, the paper's rule, uniform and random plans, at equal stored bits.
    """
    from ..evaluation.base import Settings
    from ..studies.measure import Contest, Setup, measure_plans

    settings = Settings(length=length, prefix=prefix, step=step, limit=limit, text=text, seed=seed)
    settings.check()
    loading = {"revision": revision, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    results = {"root": output_dir, "resume": resume, "command": ctx.meta[options.COMMAND_LINE]}
    setup = Setup(model, task, settings, loading, results)
    rules = {"stored_bits": stored_bits, "scores": scores, "methods": methods, "random_plans": random_plans}
    rules |= {"group_size": group_size, "profile": profile}
    own = {"data_dir": data_dir, "max_length": max_length, "strict": strict or None, "batch_size": batch_size}
    own |= {
        "include_path": include_path,
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template or None,
    }
    own |= {"contexts": contexts, "batches": batches, "new_tokens": new_tokens, "repeats": repeats, "memory": memory}
    own |= {"depths": depths}
    if leaderboard:
        refused = {"plan": plan, "preset": preset, "uniform": uniform, "baseline": baseline, "fail_if": fail_if, **own}
        _refuse(refused, "has no place in a leaderboard")
        _hold(setup, **_given(rules))
    else:
        _refuse(rules, "needs --leaderboard")
        contest = Contest(plan or [], preset or [], uniform or [], baseline or [])
        measure_plans(setup, contest, _given(own), fail_if or [])


def _hold(setup: Setup, *, profile: Path | None = None, group_size: Any = (), **rules: Any) -> None:
    """Hold a leaderboard, show it, and leave a table and a plot of it beside the records."""
    from .. import console, state
    from ..evaluation import split_tasks
    from ..evaluation.runs import RunFolders
    from ..files import write_text
    from ..models.loading import load_model
    from ..profile import Profile
    from ..reporting.leaderboard import board_json, markdown, tables
    from ..reporting.leaderboard_plot import plot_board
    from ..reporting.plots import check_plot
    from ..studies.leaderboard import hold
    from ..studies.measure import leave, warn

    found = Profile.load(state.find_profile(profile, model=setup.model))
    tasks = split_tasks("perplexity,recall" if setup.tasks is None else setup.tasks)
    page, picture = (Path(setup.results["root"]) / f"leaderboard{suffix}" for suffix in (".md", ".png"))
    check_plot(picture)
    board = hold(
        found,
        lambda: load_model(found.model.id, **setup.loading),
        tasks=tasks,
        settings=setup.settings,
        runs=RunFolders(model=state.slug(found.model.id), **setup.results),
        group_sizes=group_size,
        progress=console.progress,
        **rules,
    )
    for report in board.reports:
        warn(report)
    shown = tables(board)
    for table in shown:
        console.table(*table)
    write_text(page, markdown(shown, setup.results["command"]))
    plot_board(board, picture)
    console.text(f"tables:  {page}\npicture: {picture}\n")
    head = {"command": "eval", "model": found.model.id, "task": ",".join(tasks)}
    console.emit_json({**head, **board_json(board), "page": page, "plot": picture})
    leave(board.reports)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that were given."""
    return {name: value for name, value in options.items() if value not in (None, [])}


def _refuse(options: dict[str, Any], reason: str) -> None:
    """Raise typer.BadParameter for any option that was given."""
    for name in _given(options):
        raise typer.BadParameter(f"--{name.replace('_', '-')} {reason}")
