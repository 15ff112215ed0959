"""`kvmix demo`: profile, allocate, eval and run on the built-in model, from nothing, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console, state
from . import options

if TYPE_CHECKING:
    from ..evaluation.results import Report, Row
    from ..models.loading import LoadedModel
    from ..plan import CacheSettings, Plan
    from ..profile import Profile

MODEL = "builtin:tiny"
AVG_BITS = 2.3
RANDOM_PLANS = 3
PROMPT = "def test_copy(self):\n        d = {'a': 1}\n"


def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where profile, plans, samples and picture go.")] = Path(
        "kvmix-demo"
    ),
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Calibration samples of 1024 tokens.")] = 30,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Held-out documents, and recall exercises.")] = 10,
    seed: options.Seed = 0,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the whole method on the built-in model: a few minutes on a laptop CPU, no network."""
    from ..files import check_writable
    from ..models.loading import load_model
    from ..reporting.demo_plot import plot_demo

    picture = out / "demo.png"
    check_writable(picture)
    loaded = load_model(MODEL)
    profile = _profile(loaded, samples, seed, out, ctx)
    plans = _plans(profile, seed, out, ctx)
    reports = [_evaluate(loaded, task, plans, limit, seed, out) for task in ("perplexity", "recall")]
    _show(reports)
    plot_demo(profile, plans["kvmix"], reports[0], picture)
    sample = _generate(loaded, plans["kvmix"])
    console.text(f"picture: {picture}\nfiles:   {out}\n")
    console.emit_json(
        {
            "command": "demo",
            "model": MODEL,
            "rows": [row.as_json() for report in reports for row in report.rows],
            "text": sample,
            "plot": picture,
        }
    )


def _profile(loaded: LoadedModel, samples: int, seed: int, out: Path, ctx: typer.Context) -> Profile:
    from ..profiling import run_profile
    from ..reporting.tables import show_profile
    from ..texts import load_texts

    with console.progress("profile", samples) as bar:
        profile = run_profile(
            loaded, texts=load_texts(), source="builtin", samples=samples, seed=seed, on_step=bar.reach
        )
    path = profile.save(out / state.slug(MODEL) / state.PROFILE, ctx.meta[options.COMMAND_LINE])
    show_profile(profile, path)
    console.text("\n")
    return profile


def _plans(profile: Profile, seed: int, out: Path, ctx: typer.Context) -> dict[str, Plan]:
    """The ranked plan, the same number of high-bit layers at random (thrice), and 2 bits everywhere."""
    from ..allocation import K_BITS, V_BITS, Budget, allocate
    from ..plan import Plan

    def plan(method: str, seed: int = 0) -> Plan:
        budget = Budget(avg_bits=AVG_BITS)
        return allocate(profile, budget, method=method, k_bits=K_BITS, v_bits=V_BITS, cache=_cache(), seed=seed)

    plans = {"kvmix": plan("rank")}
    plans |= {f"random-{number}": plan("random", number) for number in range(seed, seed + RANDOM_PLANS)}
    plans["uniform-2"] = Plan.uniform(profile.model, 2, 2, _cache())
    for name, each in plans.items():
        each.save(out / state.slug(MODEL) / state.PLANS / f"{name}.yaml", ctx.meta[options.COMMAND_LINE])
        console.text(f"{name}: {each.short}\n")
    console.text("\n")
    return plans


def _cache() -> CacheSettings:
    """Small pages and a short window: the contexts here are short, and most of them should be quantized."""
    from ..plan import CacheSettings
    from ..plan.windows import Recent

    return CacheSettings(page=32, group_size=32, window=Recent(tokens=32))


def _evaluate(loaded: LoadedModel, task: str, plans: dict[str, Plan], limit: int, seed: int, out: Path) -> Report:
    from ..cache.subject import Subject
    from ..evaluation import get_task
    from ..evaluation.base import Settings
    from ..evaluation.runner import run_task
    from ..evaluation.runs import RunFolders

    subjects = [Subject(name, plan) for name, plan in plans.items()]
    runs = RunFolders(out / "results", state.slug(MODEL), resume=False)
    return run_task(get_task(task), loaded, subjects, Settings(limit=limit, seed=seed), runs, console.progress)


def _show(reports: list[Report]) -> None:
    """One table of everything that was measured."""
    perplexity, recall = reports
    columns = ("plan", "bits nominal", "stored", "quantized", "perplexity", "against unquantized", "recall")
    rows = [_cells(row, other) for row, other in zip(perplexity.rows, recall.rows, strict=True)]
    footer = "\n".join(report.description for report in reports)
    console.table(f"{MODEL} through each cache, with 95 % intervals", columns, rows, f"{footer}\n")


def _cells(perplexity: Row, recall: Row) -> list[Any]:
    value, increase = perplexity.metrics["perplexity"], perplexity.metrics.get("perplexity_increase_percent")
    share = recall.metrics["recall"]
    return [
        perplexity.plan,
        f"{perplexity.nominal_bits:.2f}",
        f"{perplexity.stored_bits:.2f}",
        f"{perplexity.quantized_share:.0%}",
        f"{value.value:.3f}",
        "" if increase is None else f"{increase.value:+.2f} % [{increase.low:+.2f}, {increase.high:+.2f}]",
        f"{share.value:.1%} [{share.low:.0%}, {share.high:.0%}]",
    ]


def _generate(loaded: LoadedModel, plan: Plan) -> str:
    """A few lines of code, continued through the ranked plan's cache."""
    from ..cache.mixed import MixedCache
    from ..decoding.generate import generate

    console.text(f"generated through the kvmix plan:\n\n{PROMPT}")
    ids = loaded.tokenizer(PROMPT).input_ids
    cache = MixedCache.from_plan(plan, loaded.model.config)
    result = generate(loaded, ids, cache, max_new_tokens=60, on_text=console.text)
    console.text("\n\n")
    return result.text
