"""`kvmix allocate`: from the scores of a profile to a plan under a budget, or to a family of plans."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console, state
from ..errors import DocumentError
from .options import (
    COMMAND_LINE,
    CommonOptions,
    Encoding,
    LoadingOptions,
    Model,
    count,
    expand,
    given,
    parse_bits,
    parse_bytes,
    parse_dtype,
    parse_groups,
    parse_percent,
)

if TYPE_CHECKING:
    from ..allocation import AllocationOptions, Budget, Start
    from ..plan import CacheSettings, Plan
    from ..plan.basis import BasisFile
    from ..profile import Profile

FAMILY, SEARCH, PAPER, TRANSFORM = "pareto", "search", "rank", "transform"
"""The methods that write several plans, that measure plans, of the paper, and that code directions."""


def _file_name(name: str | None) -> str | None:
    """Raise typer.BadParameter for a name that is not a plain file name."""
    if name is not None and not re.fullmatch(r"[\w][\w.+-]*", name):
        raise typer.BadParameter(f"'{name}' cannot be the name of a plan; use --out to write to another folder")
    return name


@dataclass(frozen=True)
class BudgetOptions:
    """The budget, of which there is exactly one, and the method that spends it."""

    avg_bits: Annotated[
        float | None, typer.Option(metavar="BITS", help="Budget: mean nominal bits of keys and values, e.g. 2.3.")
    ] = None
    stored_bits: Annotated[
        float | None, typer.Option(metavar="BITS", help="Budget: the same with scales and zeros, e.g. 3.0.")
    ] = None
    memory: Annotated[
        int | None,
        typer.Option(metavar="SIZE", parser=parse_bytes, help="Budget: bytes of the cache, e.g. 8GiB."),
    ] = None
    max_loss: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT", parser=parse_percent, help="Budget: predicted rise of the perplexity, e.g. 0.5%."
        ),
    ] = None
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="paper: 20 % of the layers at K 3 / V 4 bits, the rest at 2.")
    ] = None
    context: Annotated[
        int, typer.Option(min=1, metavar="N", parser=count(1), help="Tokens that bytes are counted at.")
    ] = 32768
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences that bytes are counted at.")] = 1
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="transform (bits of directions), ilp (exact), rank (the paper), cut, uniform, random, search, pareto "
            "(no budget) [default: transform if the profile has directions, ilp if a score knows widths, else rank].",
        ),
    ] = None

    def __post_init__(self) -> None:
        """Raise typer.BadParameter unless there is exactly one budget, or none for the method that takes none."""
        budgets = len(given(self.limits)) + (self.preset is not None)
        if self.method == FAMILY and budgets:
            raise typer.BadParameter("pareto takes no budget: it makes plans along the whole range; for one use ilp")
        if self.method != FAMILY and budgets != 1:
            raise typer.BadParameter(
                "give exactly one budget: --avg-bits, --stored-bits, --memory, --max-loss or --preset"
            )

    @property
    def limits(self) -> dict[str, Any]:
        """Return the limits by the names that `Budget` has for them."""
        return {name: getattr(self, name) for name in ("avg_bits", "stored_bits", "memory", "max_loss")}


@dataclass(frozen=True)
class StorageOptions:
    """The widths to choose from, and the settings of the cache."""

    k_bits: Annotated[
        Any, typer.Option(metavar="LIST", parser=parse_bits, help="Widths for keys [default: 2,3,4,8].")
    ] = None
    v_bits: Annotated[
        Any,
        typer.Option(
            metavar="LIST",
            parser=parse_bits,
            help="Widths for values [default: 2,4,8; to ilp, pareto, search also 3].",
        ),
    ] = None
    min_bits: Annotated[int | None, typer.Option(metavar="BITS", help="Use no narrower width.")] = None
    max_bits: Annotated[int | None, typer.Option(metavar="BITS", help="Use no wider width.")] = None
    pin: Annotated[
        list[str] | None,
        typer.Option(metavar="PINS", help="Layers decided by hand, e.g. '0,-1:k8v8;2-4:k4v2'; repeatable."),
    ] = None
    group_size: Annotated[
        Any,
        typer.Option(
            metavar="LIST",
            parser=parse_groups,
            help="Elements that share a scale, or row for all; several for methods that choose [default: 64].",
        ),
    ] = None
    page: Annotated[int | None, typer.Option(metavar="N", help="Tokens quantized together [default: 128].")] = None
    sink: Annotated[int | None, typer.Option(metavar="N", help="First tokens kept exact [default: 4].")] = None
    window: Annotated[
        str | None,
        typer.Option(metavar="W", help="Last tokens kept exact: recent:N, rpc or none [default: recent:128]."),
    ] = None
    scale_dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", parser=parse_dtype, help="Of scales: float16 or bfloat16 [default: float16]."),
    ] = None
    encode: Encoding = None
    exact: Annotated[
        int | None,
        typer.Option(
            metavar="N", parser=count(0), help="Tokens of each page that transform codes keep exact [default: 1]."
        ),
    ] = None
    put_on: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="PRESET", help="Also its transforms, tiers and runs, e.g. mikv; repeatable."),
    ] = None

    def caches(self, base: CacheSettings) -> list[CacheSettings]:
        """Return cache settings with these options, one for each group size. Raises typer.BadParameter."""
        from ..plan import CacheSettings
        from ..plan.document import reason
        from ..plan.windows import parse_window

        names = ("page", "sink", "scale_dtype", "window", "encode")
        settings = {
            **base.model_dump(),
            **{name: value for name in names if (value := getattr(self, name)) is not None},
        }
        if self.window is not None:
            settings["window"] = parse_window(self.window)
        try:
            return [
                CacheSettings.model_validate({**settings, "group_size": size})
                for size in self.group_size or [base.group_size]
            ]
        except ValueError as error:
            raise typer.BadParameter(reason(error)) from error


@dataclass(frozen=True)
class SearchOptions:
    """The score, and the work that `--method search` does."""

    score: Annotated[
        str | None, typer.Option(metavar="NAME", help="Score to use [default: the best for the method].")
    ] = None
    trials: Annotated[int, typer.Option(min=1, metavar="N", help="Plans that search measures.")] = 40
    calibration: Annotated[str, typer.Option(metavar="TEXT", help="What search measures on.")] = "builtin"
    samples: Annotated[int, typer.Option(min=1, metavar="N", parser=count(1), help="Documents of it.")] = 4
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted search, or a shorter one.")] = (
        False
    )


@dataclass(frozen=True)
class PlanFileOptions:
    """The profile that is read, and the plan file that is written."""

    name: Annotated[
        str | None, typer.Option(metavar="NAME", callback=_file_name, help="Of the plan [default: e.g. rank-2.3].")
    ] = None
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write [default: plans/NAME.yaml beside the profile].")
    ] = None
    profile: Annotated[Path | None, typer.Option(metavar="FILE", help="Profile to use [default: the newest].")] = None
    model: Model = None


@expand
def allocate(
    ctx: typer.Context,
    budget: BudgetOptions,
    storage: StorageOptions,
    effort: SearchOptions,
    files: PlanFileOptions,
    loading: LoadingOptions,
    common: CommonOptions,
) -> None:
    """Decide every layer's bits under a budget: --avg-bits, --stored-bits, --memory, --max-loss or --preset."""
    if budget.method == FAMILY and files.out is not None:
        raise typer.BadParameter("pareto writes several plans; use --name instead of --out")
    base = _base(budget)
    caches = [_with_presets(cache, storage) for cache in storage.caches(base.cache)]
    from ..allocation import default_method
    from ..profile import Profile

    path = state.find_profile(files.profile, model=files.model, say=console.notice)
    source = Profile.load(path)
    method = budget.method or (PAPER if budget.preset else default_method(source))
    if budget.method is None and method != PAPER:
        knows = "directions" if method == TRANSFORM else "a score that knows widths"
        console.notice(f"method {method}, since the profile has {knows}; the paper's is --method rank")
    chosen = _choices(source, method, base, storage, caches, effort.score, loading.seed)
    if method == TRANSFORM:
        chosen["basis"] = _basis(source, path)
    command = ctx.meta[COMMAND_LINE]
    if method == FAMILY:
        from ..allocation import frontier

        family = files.name or "+".join([FAMILY, *(storage.put_on or [])])
        folder = _plans_folder(path, files.profile, source)
        _show_family(frontier(source, **chosen), family, folder, command, budget)
        return
    name = files.name or _default_name(method, budget, storage, effort, loading.seed)
    path = files.out or _plans_folder(path, files.profile, source) / f"{name}.yaml"
    plan = _decide(source, method, base.budget, chosen, path, effort, loading)
    if storage.put_on:
        plan = plan.model_copy(update={"provenance": {**plan.provenance, "with": storage.put_on}})
        if budget.memory is None:
            console.notice(
                f"the budget is of the layers' own bits; the table counts {' and '.join(storage.put_on)}, too"
            )
    if plan.cache.transform is not None and (basis := chosen.get("basis")) is not None:
        basis.save(path.parent / plan.cache.transform.basis)
    plan.save(path, command)
    _show(plan, source, path, budget.context, budget.batch)


def _base(budget: BudgetOptions) -> Start:
    """Return budget, widths and cache before other options. Raises typer.BadParameter for an unknown preset."""
    from ..allocation import Budget, Start, preset_start
    from ..errors import StateError
    from ..plan import CacheSettings

    if budget.preset is None:
        limit = Budget(**given(budget.limits), context=budget.context, batch=budget.batch)
        return Start(limit, None, None, CacheSettings())
    try:
        return preset_start(budget.preset)
    except StateError as error:
        raise typer.BadParameter(str(error)) from error


def _with_presets(cache: CacheSettings, storage: StorageOptions) -> CacheSettings:
    """Return the cache with everything that presets do besides choosing widths.

    Raises:
        PlanError: if they cannot work on the page given.
    """
    from ..errors import PlanError
    from ..studies.selection import with_presets

    presets, page = storage.put_on or [], storage.page
    settings = with_presets(cache, presets, "this plan", console.notice)
    if page not in (None, settings.page):
        raise PlanError(f"{' and '.join(presets)} cannot go with pages of {page} tokens; leave out --page")
    return settings


def _choices(
    source: Profile,
    method: str,
    base: Start,
    storage: StorageOptions,
    caches: Sequence[CacheSettings],
    score: str | None,
    seed: int,
) -> AllocationOptions:
    """Return the options of the method, and say if it does not choose among several group sizes."""
    from ..allocation import EXACT, METHODS, default_score, parse_pins

    if len(caches) > 1 and "group_sizes" not in METHODS[method].uses:
        console.notice(f"{method} does not choose among group sizes: all groups have {caches[0].group_size} elements")
    return {
        "k_bits": storage.k_bits or base.k_bits,
        "v_bits": storage.v_bits or base.v_bits,
        "min_bits": storage.min_bits,
        "max_bits": storage.max_bits,
        "pins": parse_pins(storage.pin, source.model) if storage.pin else None,
        "group_sizes": [cache.group_size for cache in caches],
        "cache": caches[0],
        "score": score or default_score(source, method),
        "seed": seed,
        "exact": EXACT if storage.exact is None else storage.exact,
    }


def _basis(source: Profile, path: Path) -> BasisFile:
    """Return the directions of a profile's moments. Raises DocumentError, or BudgetError for moments of no use."""
    from ..allocation import TRANSFORM_SCORE, make_bases
    from ..plan.moments import read_moments

    record = source.score(TRANSFORM_SCORE).moments
    if record is None:
        why = f"it has no moments of keys and values; measure them with `kvmix profile --score {TRANSFORM_SCORE}`"
        raise DocumentError(f"profile of {source.model.id}", [why])
    return make_bases(source, read_moments(path.parent, record))


def _decide(
    source: Profile,
    method: str,
    budget: Budget,
    chosen: AllocationOptions,
    path: Path,
    effort: SearchOptions,
    loading: LoadingOptions,
) -> Plan:
    if method != SEARCH:
        from ..allocation import allocate as decide

        return decide(source, budget, method=method, **chosen)
    from ..files import check_writable
    from ..studies.search import search

    check_writable(path)
    return search(
        source,
        budget,
        chosen,
        lambda: loading.load(source.model.id, source.model.revision),
        journal=state.trials_path(path),
        resume=effort.resume,
        trials=effort.trials,
        texts=effort.calibration,
        samples=effort.samples,
        progress=console.progress,
    )


def _plans_folder(profile: Path, named: Path | None, source: Profile) -> Path:
    """Return the folder beside the profile; that of the model if the profile was named and can be anywhere."""
    return (profile.parent if named is None else state.model_dir(source.model.id)) / state.PLANS


def _default_name(method: str, budget: BudgetOptions, storage: StorageOptions, effort: SearchOptions, seed: int) -> str:
    """Return a name that depends on the options alone: `rank-2.3`, `ilp-stored-3`, `rank-8GiB-32768x1`.

    Options that change the plan and are not in the name add a short hash, so that no plan replaces another one.
    """
    from ..allocation import METHODS
    from ..plan.sizes import format_bytes

    if budget.preset is not None:
        parts = [budget.preset] if method == "rank" else [budget.preset, method]
    elif budget.memory is not None:
        parts = [method, format_bytes(budget.memory).replace(" ", ""), f"{budget.context}x{budget.batch}"]
    elif budget.max_loss is not None:
        parts = [method, f"max-loss-{100 * budget.max_loss:g}pct"]
    elif budget.stored_bits is not None:
        parts = [method, f"stored-{budget.stored_bits:g}"]
    else:
        parts = [method, f"{budget.avg_bits:g}"]
    if "seed" in METHODS[method].uses:
        parts.append(f"seed{seed}")
    others = {**asdict(storage), "put_on": None, "score": effort.score}
    if method == SEARCH and (effort.calibration, effort.samples) != (SearchOptions.calibration, SearchOptions.samples):
        others |= {"calibration": effort.calibration, "samples": effort.samples}
    if others := given(others):
        parts.append(hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:6])
    return "+".join(["-".join(parts), *(storage.put_on or [])])


def _show_family(plans: Sequence[Plan], family: str, folder: Path, command: str, budget: BudgetOptions) -> None:
    """Write the plans as `<family>-<stored bits>.yaml`, each whole or not at all, and show them. Raises OutputError."""
    from ..reporting.family import family_json, family_table, member_name

    named = [(plan.save(folder / f"{member_name(plan, family)}.yaml", command), plan) for plan in plans]
    console.table(*family_table(named))
    console.emit_json({"command": "allocate", **family_json(named, budget.context, budget.batch)})


def _show(plan: Plan, source: Profile, path: Path, context: int, batch: int) -> None:
    from ..reporting.tables import loss_text, plan_json, plan_table
    from ..studies.explain import settings_notices

    loss, method = plan.provenance.get("predicted_loss"), plan.provenance["method"]
    console.table(*plan_table(plan, path, context, batch))
    if loss is not None:
        name = plan.provenance["score"]
        console.text(f"{loss_text(loss, name)}\n")
        for sentence in settings_notices(name, source.score(name), plan.cache):
            console.notice(sentence)
    console.emit_json(
        {
            "command": "allocate",
            "model": plan.model.id,
            "plan": path,
            "method": method,
            "predicted_loss": loss,
            **plan_json(plan, context, batch),
            "provenance": plan.provenance,
        }
    )
