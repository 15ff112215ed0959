"""`kvmix eval`: measure plans against the unquantized cache, or (`--leaderboard`) methods against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options


def evaluate(
    ctx: typer.Context,
    task: Annotated[
        Any,
        typer.Option(metavar="LIST", parser=options.parse_names, help="perplexity [the default], recall, memory."),
    ] = None,
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
    leaderboard: Annotated[
        bool, typer.Option("--leaderboard", help="Compare methods instead of plans of your own.")
    ] = False,
    stored_bits: Annotated[
        Any, typer.Option(metavar="LIST", parser=options.parse_budgets, help="Leaderboard: budgets, e.g. 2.5,3,3.5,4.")
    ] = None,
    scores: Annotated[
        Any, typer.Option(metavar="LIST", parser=options.parse_names, help="Leaderboard: scores [default: all].")
    ] = None,
    methods: Annotated[
        Any, typer.Option(metavar="LIST", parser=options.parse_names, help="Leaderboard: solvers [default: all].")
    ] = None,
    group_size: Annotated[
        Any, typer.Option(metavar="LIST", parser=options.parse_groups, help="Leaderboard: to choose from, e.g. 64,32.")
    ] = None,
    random_plans: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Leaderboard: random plans a budget [default: 8].")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Leaderboard: profile to use [default: the newest].")
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
    from .leaderboard import hold
    from .measure import Setup, measure_plans

    settings = Settings(length=length, prefix=prefix, step=step, limit=limit, text=text, seed=seed)
    settings.check(None)
    loading = {"revision": revision, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    results = {"root": output_dir, "resume": resume, "command": ctx.meta[options.COMMAND_LINE]}
    setup = Setup(model, task, settings, loading, results)
    rules = {"stored_bits": stored_bits, "scores": scores, "methods": methods, "random_plans": random_plans}
    rules |= {"group_size": group_size, "profile": profile}
    if leaderboard:
        _refuse({"plan": plan, "uniform": uniform, "fail_if": fail_if}, "has no place in a leaderboard")
        hold(setup, **{name: value for name, value in rules.items() if value is not None})
    else:
        _refuse(rules, "needs --leaderboard")
        measure_plans(setup, plan or [], uniform or [], fail_if or [])


def _refuse(given: dict[str, Any], reason: str) -> None:
    """Raise typer.BadParameter for any option that was given."""
    for name, value in given.items():
        if value not in (None, []):
            raise typer.BadParameter(f"--{name.replace('_', '-')} {reason}")
