"""`kvmix export PLAN --to ENGINE`: write a plan in the form of another engine, and measure what it costs there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console, state
from ..errors import OutputError
from .options import COMMAND_LINE, CommonOptions, LoadingOptions, Model, expand, refuse, say_unused
from .values import count_option, output_option

if TYPE_CHECKING:
    from ..export import Export
    from ..plan import Plan
    from ..studies.exported import ExportCost

COST = "Cost, with --measure"
OF_MODEL = ("dtype", "device", "seed", "trust_remote_code", "allow_pickle", "threads")
"""Options that a plan is exported without."""


@dataclass(frozen=True)
class ExportOptions:
    """The plan, and the engine to write it for."""

    to: Annotated[
        str, typer.Option(metavar="ENGINE", help="vllm, vllm-plugin, modelopt, llama.cpp, ik_llama or kvtuner.")
    ]
    plan: Annotated[
        str | None, typer.Argument(metavar="PLAN", help="File or name of a plan [default: the newest].")
    ] = None
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A format of the engine, such as int4_per_token_head [default: the smallest in which no layer has "
            "fewer bits].",
        ),
    ] = None
    out: Annotated[
        Path | None,
        output_option("Where to write [default: standard output]."),
    ] = None
    model: Model = None
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the divergence here, and there by a simulation of its formats.")
    ] = False
    text: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", rich_help_panel=COST, help="Text, as of eval [default: the profile's]."),
    ] = None
    length: Annotated[Any, count_option("Tokens of a document [default: 1024].", least=4, rich_help_panel=COST)] = None
    limit: Annotated[Any, count_option("Most documents [default: 10].", rich_help_panel=COST)] = None
    output_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=COST, help="Where every sample is kept [default: results]."),
    ] = None

    def __post_init__(self) -> None:
        """Raise typer.BadParameter for an option of a measurement that is not asked for."""
        if not self.measure:
            names = ("text", "length", "limit", "output_dir")
            refuse({name: getattr(self, name) for name in names}, "needs --measure")


@expand
def export(ctx: typer.Context, what: ExportOptions, loading: LoadingOptions, common: CommonOptions) -> None:
    """Write a plan for another engine, if that engine can express it, and say what it stores other than the plan.

    With --measure: the divergence from the unquantized cache, of the plan here and of the engine's formats, simulated.
    """
    from ..export import TARGETS
    from ..export.plugin import with_measured_loss
    from ..plan import Plan

    if not what.measure:
        say_unused(ctx, OF_MODEL, "is for --measure, which loads the model")
    target = TARGETS[what.to]
    path = state.find_plan(what.plan, model=what.model, say=console.notice)
    found = Plan.load(path)
    made = target.export(found, what.format)
    out = None if what.out == Path("-") else what.out
    if out is not None:
        _check_out(out, path, made)
    for line in made.rounded:
        console.notice(f"rounded: {line}")
    for line in made.losses:
        console.notice(f"not held: {line}")
    console.notice(f"stored: {made.stored_bits:.3g} bits an element there, {found.bits.stored:.3g} of the plan here")
    cost = _measure(ctx, what, loading, path.stem, found, made) if what.measure else None
    if cost is not None:
        here, there = cost.here.value, cost.there.value
        console.notice(
            f"divergence: {there:.3g} nats a token there, simulated, {here:.3g} of the plan here, on {cost.tokens} "
            f"tokens of {cost.text}"
        )
        if made.in_blocks:
            made = with_measured_loss(made, cost.text, cost.tokens, there, here)
    console.notice(f"caution: {target.caution}")
    _write(made, out)
    console.emit_json(
        {
            "command": "export",
            "model": found.model.id,
            "plan": path,
            "to": what.to,
            "text": made.text,
            "out": out,
            "caution": target.caution,
            "rounded": made.rounded,
            "not_held": list(made.losses),
            "stored_bits": made.stored_bits,
            "plan_stored_bits": found.bits.stored,
            "layers": _layers(made),
            "measured": None if cost is None else cost.as_json(),
        }
    )


def _check_out(out: Path, plan: Path, made: Export) -> None:
    """Raise OutputError if the export cannot be written, or would replace a plan or profile that is no export."""
    from ..files import check_writable
    from ..plan.plan import FORMAT as PLAN_FORMAT
    from ..profile import FORMAT as PROFILE_FORMAT

    check_writable(out)
    if state.is_headed(out, PLAN_FORMAT, PROFILE_FORMAT) and (out.samefile(plan) or not made.in_blocks):
        raise OutputError(f"{out} is a plan or profile of kvmix, which the export would replace: name another file")


def _write(made: Export, out: Path | None) -> None:
    """Write the export; None for standard output. Raises OutputError."""
    from ..files import write_text
    from ..studies.directions import keep_basis

    if out is None:
        console.text(made.text)
        return
    if made.in_blocks:  # first, so that no plan is written without its basis
        keep_basis(made.plan, out.parent)
    write_text(out, made.text)
    console.notice(f"wrote {out}")


def _layers(made: Export) -> list[dict[str, Any]] | None:
    if made.formats is None:
        return None
    return [{"index": layer, "k": k.name, "v": v.name} for layer, (k, v) in sorted(made.formats.items())]


def _measure(
    ctx: typer.Context, what: ExportOptions, loading: LoadingOptions, name: str, plan: Plan, made: Export
) -> ExportCost:
    from ..evaluation.base import Settings
    from ..evaluation.runs import RunFolders
    from ..studies.exported import measure_export, profile_text

    model = what.model or plan.model.id
    length = what.length or Settings.length
    text = what.text or profile_text(plan)
    settings = Settings(length, prefix=length // 4, limit=what.limit, text=text, seed=loading.seed)
    loaded = loading.load(model, plan.model.revision)
    folders = RunFolders(
        model=state.slug(model),
        root=what.output_dir or Path("results"),
        resume=True,
        may_begin=True,
        command=ctx.meta[COMMAND_LINE],
    )
    return measure_export(what.to, name, plan, made, loaded, settings, folders, console.progress)
