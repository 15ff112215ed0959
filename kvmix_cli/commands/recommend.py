"""`kvmix recommend MODEL`: the smallest plan that is safe at a context, with its proof."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console, state
from ..files import after_saving
from .options import COMMAND_LINE, CommonOptions, LoadingOptions, ModelOptions, expand
from .values import count_option, parse_bytes, parse_percent

if TYPE_CHECKING:
    from ..models.loading import LoadedModel
    from ..studies.recommend import Purpose, Recommendation


def parse_share(text: str) -> float:
    """Return `1%` or `0.01` as 0.01. A number from 1 on without the sign could mean either, so it is refused."""
    if "%" in text:
        return parse_percent(text)
    match = re.fullmatch(r"\s*(0(?:\.\d*)?|\.\d+)\s*", text, re.ASCII)
    if not match:
        raise typer.BadParameter(f"'{text}' is not a share; write it like 1% or 0.01")
    return float(match[1])


@dataclass(frozen=True)
class RecommendOptions:
    """The bound on the loss, the context, and the text that a plan is proven on."""

    context: Annotated[int | None, count_option("Tokens [default: the model's limit, at most 32K].")] = None
    memory: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            parser=parse_bytes,
            help="Limit for weights, prompt and cache together, e.g. 8GiB [default: none].",
        ),
    ] = None
    max_loss: Annotated[
        Any,
        typer.Option(
            metavar="SHARE",
            parser=parse_share,
            help="Largest loss of perplexity that counts as safe: 1% or 0.01, which is a KL of .00995 nats a token.",
        ),
    ] = "1%"
    task: Annotated[
        str, typer.Option(metavar="LIST", help="Tasks that a plan has to pass; KL is measured in any case.")
    ] = "perplexity,recall"
    text: Annotated[
        str,
        typer.Option(
            metavar="SOURCE", help="Text to measure on: builtin (held out), wikitext2, c4, a file or a folder."
        ),
    ] = "builtin"
    calibration: Annotated[str, typer.Option(metavar="TEXT", help="Text to profile on, if there is no profile.")] = (
        "builtin"
    )
    limit: Annotated[int | None, count_option("Most samples of a task [default: the task's].")] = None
    step: Annotated[int, count_option("Tokens fed at a time; 1 is exact decoding.")] = 32
    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where every sample is kept.")] = Path("results")
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and about how long it takes, and do none of it.")
    ] = False


@expand
def recommend(
    ctx: typer.Context, what: RecommendOptions, which: ModelOptions, loading: LoadingOptions, common: CommonOptions
) -> None:
    """Find the smallest plan that is safe at a context, and prove it through the quantized cache.

    Profile, plans and samples that exist are used; what was interrupted goes on with the same command.
    Several processes with the same command and folders share the work.
    """
    model = which.needed
    from ..evaluation import split_tasks
    from ..studies.recommend import Purpose

    purpose = Purpose(
        model=model,
        context=what.context,
        max_loss=what.max_loss,
        memory=what.memory,
        tasks=split_tasks(what.task),
        text=what.text,
        calibration=what.calibration,
        limit=what.limit,
        step=what.step,
        seed=loading.seed,
        revision=which.revision,
        dtype=loading.dtype,
        trust_remote_code=loading.trust_remote_code,
    )
    if what.dry_run:
        _show_forecast(purpose, lambda: loading.load(model, which.revision))
        return
    from ..evaluation.runs import RunFolders
    from ..studies.recommend import recommend as find

    command = ctx.meta[COMMAND_LINE]
    found = find(
        purpose,
        lambda: loading.load(model, which.revision),
        RunFolders(what.output_dir, state.slug(model), resume=True, command=command, may_begin=True, is_shared=True),
        command=command,
        say=console.notice,
        progress=console.progress,
    )
    with after_saving(f"the plan is saved in {found.best.path}, and all samples in {what.output_dir}"):
        _show(found)


def _show_forecast(purpose: Purpose, load: Callable[[], LoadedModel]) -> None:
    from ..reporting.tables.recommendation import forecast_json, forecast_table
    from ..studies.recommend import forecast

    found = forecast(purpose, load)
    console.table(*forecast_table(found))
    console.emit_json(forecast_json(found))


def _show(found: Recommendation) -> None:
    from ..reporting.tables.recommendation import answer_text, commands, recommendation_json, recommendation_tables

    for table in recommendation_tables(found):
        console.table(*table)
    console.text(f"{answer_text(found)}\n\n")
    if found.best.outcome != "not-safe":
        console.text("".join(f"{engine + ':':14}{line}\n" for engine, line in commands(found).items()))
    console.emit_json(recommendation_json(found))
