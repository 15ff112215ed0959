"""`kvmix demo`: profile, allocate, eval and run on the built-in model, from nothing, in a few minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from ..files import after_saving
from .options import COMMAND_LINE, CommonOptions, Seed, Threads, expand
from .values import count_option

if TYPE_CHECKING:
    from ..evaluation.results import Report, Row
    from ..studies.demo import Effort


@dataclass(frozen=True)
class DemoOptions:
    """The amount of work, and where its files go."""

    out: Annotated[Path, typer.Option(metavar="DIR", help="Where profile, plans, samples and picture go.")] = Path(
        "kvmix-demo"
    )
    samples: Annotated[int | None, count_option("Calibration samples of 1024 tokens [default: 30].")] = None
    limit: Annotated[int | None, count_option("Held-out documents, and recall exercises [default: 10].")] = None
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything: about a minute.")] = False
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted demo.")] = False
    seed: Seed = 0
    threads: Threads = None

    @property
    def effort(self) -> Effort:
        """Return the amount of work."""
        from ..studies.demo import QUICK, Effort

        effort = QUICK if self.quick else Effort()
        return replace(effort, samples=self.samples or effort.samples, limit=self.limit or effort.limit)


@expand
def demo(ctx: typer.Context, what: DemoOptions, common: CommonOptions) -> None:
    """Run the whole method on the built-in model: a few minutes on a laptop CPU, no network."""
    from ..files import check_writable

    picture = what.out / "demo.png"
    check_writable(picture)
    from ..models.loading import load_model
    from ..reporting.plots.demo import plot_demo
    from ..reporting.tables.evaluation import rows_json
    from ..reporting.tables.plans import profile_tables
    from ..studies import demo as steps

    loaded = load_model(steps.MODEL)
    effort, seed, command = what.effort, what.seed, ctx.meta[COMMAND_LINE]
    with console.progress("profile", effort.samples) as bar:
        profile = steps.make_profile(
            loaded, effort, seed, what.out, resume=what.resume, command=command, on_step=bar.reach
        )
    for table in profile_tables(profile, steps.profile_path(what.out), ascii_only=not console.is_unicode()):
        console.table(*table)
    plans = steps.make_plans(profile, effort, seed, what.out, command)
    console.text("\n" + "".join(f"{name}: {plan.short}\n" for name, plan in plans.items()) + "\n")
    reports = steps.evaluate(loaded, plans, effort, seed, what.out, resume=what.resume, progress=console.progress)
    with after_saving(f"profile, plans and all samples are saved in {what.out}: --resume goes on from there"):
        _show(reports, steps.MODEL)
        plot_demo(profile, {name: plans[name] for name in (steps.RANKED, steps.CODED)}, reports[0], picture)
    console.text(f"generated through the {steps.CODED} plan:\n\n{steps.PROMPT}")
    sample = steps.generate_sample(loaded, plans[steps.CODED], console.text)
    console.text(f"\n\npicture: {picture}\nfiles:   {what.out}\n")
    console.emit_json(
        {"command": "demo", "model": steps.MODEL, "rows": rows_json(reports), "text": sample, "plot": picture}
    )


def _show(reports: Sequence[Report], model: str) -> None:
    """Show everything that was measured in one table."""
    perplexity, recall = reports
    columns = ("plan", "bits nominal", "stored", "quantized", "perplexity", "against unquantized", "KL", "recall")
    rows = [_cells(row, other) for row, other in zip(perplexity.rows, recall.rows, strict=True)]
    footer = "\n".join(report.description for report in reports)
    console.table(f"{model} through each cache, with 95 % intervals", columns, rows, f"{footer}\n")


def _cells(perplexity: Row, recall: Row) -> list[str]:
    from ..reporting.tables.evaluation import format_estimate

    value, increase = perplexity.metrics["perplexity"], perplexity.metrics.get("perplexity_increase_percent")
    kl, share = perplexity.metrics.get("kl"), recall.metrics["recall"]
    return [
        perplexity.plan,
        f"{perplexity.nominal_bits:.2f}",
        f"{perplexity.stored_bits:.2f}",
        f"{perplexity.quantized_share:.0%}",
        f"{value.value:.3f}",
        "" if increase is None else f"{increase.value:+.2f} % [{increase.low:+.2f}, {increase.high:+.2f}]",
        format_estimate(kl, "") if kl is not None else "",
        f"{share.value:.1%} [{share.low:.0%}, {share.high:.0%}]",
    ]
