"""`kvmix allocate`: from the scores of a profile to a plan under a budget, or to a family of plans."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console, state
from . import options

if TYPE_CHECKING:
    from ..allocation import AllocationOptions, Budget, Start
    from ..models.loading import LoadedModel
    from ..plan import CacheSettings, Plan
    from ..profile import Profile


def allocate(
    ctx: typer.Context,
    avg_bits: Annotated[
        float | None, typer.Option(metavar="BITS", help="Budget: mean nominal bits of keys and values, e.g. 2.3.")
    ] = None,
    stored_bits: Annotated[
        float | None, typer.Option(metavar="BITS", help="Budget: the same with scales and zeros, e.g. 3.0.")
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(metavar="SIZE", parser=options.parse_bytes, help="Budget: bytes of the cache, e.g. 8GiB."),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT", parser=options.parse_percent, help="Budget: predicted rise of the perplexity, e.g. 0.5%."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="paper: 20 % of the layers at K 3 / V 4 bits, the rest at 2.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that bytes are counted at.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences that bytes are counted at.")] = 1,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="ilp (exact), rank (the paper), cut, uniform, random, search, or pareto (no budget) "
            "[default: ilp if a score knows widths, else rank].",
        ),
    ] = None,
    k_bits: Annotated[
        Any, typer.Option(metavar="LIST", parser=options.parse_bits, help="Widths for keys [default: 2,3,4,8].")
    ] = None,
    v_bits: Annotated[
        Any,
        typer.Option(
            metavar="LIST",
            parser=options.parse_bits,
            help="Widths for values [default: 2,4,8; to ilp, pareto, search also 3].",
        ),
    ] = None,
    min_bits: Annotated[int | None, typer.Option(metavar="BITS", help="Use no narrower width.")] = None,
    max_bits: Annotated[int | None, typer.Option(metavar="BITS", help="Use no wider width.")] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(metavar="PINS", help="Layers decided by hand, e.g. '0,-1:k8v8;2-4:k4v2'; repeatable."),
    ] = None,
    group_size: Annotated[
        Any,
        typer.Option(
            metavar="LIST",
            parser=options.parse_groups,
            help="Elements that share a scale, or row for all; several for methods that choose [default: 64].",
        ),
    ] = None,
    page: Annotated[int | None, typer.Option(metavar="N", help="Tokens quantized together [default: 128].")] = None,
    sink: Annotated[int | None, typer.Option(metavar="N", help="First tokens kept exact [default: 4].")] = None,
    window: Annotated[
        str | None,
        typer.Option(metavar="W", help="Last tokens kept exact: recent:N, rpc or none [default: recent:128]."),
    ] = None,
    scale_dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Of scales: float16 or bfloat16 [default: float16].")
    ] = None,
    put_on: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="PRESET", help="Also its transforms, tiers and runs, e.g. mikv; repeatable."),
    ] = None,
    score: Annotated[
        str | None, typer.Option(metavar="NAME", help="Score to use [default: the best for the method].")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, metavar="N", help="Plans that search measures.")] = 40,
    calibration: Annotated[str, typer.Option(metavar="TEXT", help="What search measures on.")] = "builtin",
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Documents of it.")] = 4,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted search, or a shorter one.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", callback=_file_name, help="Of the plan [default: e.g. rank-2.3].")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write [default: plans/NAME.yaml beside the profile].")
    ] = None,
    profile: Annotated[Path | None, typer.Option(metavar="FILE", help="Profile to use [default: the newest].")] = None,
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    profiles_dir: options.ProfilesDir = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Decide every layer's bits under a budget: --avg-bits, --stored-bits, --memory, --max-loss or --preset."""
    from ..allocation import FAMILY, METHODS, SEARCH, default_method, default_score, frontier, parse_pins
    from ..allocation import allocate as decide
    from ..profile import Profile
    from ..studies.search import search

    limits = {"avg_bits": avg_bits, "stored_bits": stored_bits, "memory": memory, "max_loss": max_loss}
    settings = _settings(method, preset, limits, context, batch)
    overrides = {"page": page, "sink": sink, "scale_dtype": scale_dtype, "window": window}
    given = {key: value for key, value in overrides.items() if value is not None}
    caches = [_with_presets(cache, put_on or [], page) for cache in _caches(settings.cache, given, group_size)]
    source = Profile.load(state.find_profile(profile, model=model))
    method = method or ("rank" if preset else default_method(source))
    chosen: AllocationOptions = {
        "k_bits": k_bits or settings.k_bits,
        "v_bits": v_bits or settings.v_bits,
        "min_bits": min_bits,
        "max_bits": max_bits,
        "pins": parse_pins(pin, source.model) if pin else None,
        "group_sizes": [cache.group_size for cache in caches],
        "cache": caches[0],
        "score": score or default_score(source, method),
        "seed": seed,
    }
    if len(caches) > 1 and "group_sizes" not in METHODS[method].uses:
        console.notice(f"{method} does not choose among group sizes: all groups have {caches[0].group_size} elements")
    command = ctx.meta[options.COMMAND_LINE]
    if method == FAMILY:
        if out is not None:
            raise typer.BadParameter("pareto writes several plans; use --name instead of --out")
        family = name or "+".join([FAMILY, *(put_on or [])])
        _show_family(frontier(source, **chosen), family, command, context, batch)
        return
    name = name or "+".join([_default_name(method, settings.budget, preset, seed), *(put_on or [])])
    path = out or state.plan_path(source.model.id, name)
    if method == SEARCH:
        from ..files import check_writable
        from ..models.loading import load_model

        check_writable(path)

        def load() -> LoadedModel:
            name, revision = source.model.id, source.model.revision
            return load_model(name, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)

        plan = search(
            source,
            settings.budget,
            chosen,
            load,
            journal=state.trials_path(path),
            resume=resume,
            trials=trials,
            texts=calibration,
            samples=samples,
            progress=console.progress,
            notice=console.alert,
        )
    else:
        plan = decide(source, settings.budget, method=method, **chosen)
    if put_on:
        plan = plan.model_copy(update={"provenance": {**plan.provenance, "with": put_on}})
        if memory is None:
            console.notice(f"the budget is of the layers' own bits; the table counts {' and '.join(put_on)}, too")
    plan.save(path, command)
    _show(plan, source, path, context, batch)


def _settings(method: str | None, preset: str | None, limits: dict[str, Any], context: int, batch: int) -> Start:
    """Budget, ladders and cache before overrides. Raises typer.BadParameter unless there is exactly one budget."""
    from ..allocation import FAMILY, Budget, Start, preset_start
    from ..errors import StateError
    from ..plan import CacheSettings

    given = {key: limit for key, limit in limits.items() if limit is not None}
    budgets = len(given) + (preset is not None)
    if method == FAMILY and budgets:
        raise typer.BadParameter("pareto takes no budget: it makes plans along the whole range; for one use ilp")
    if method != FAMILY and budgets != 1:
        raise typer.BadParameter("give exactly one budget: --avg-bits, --stored-bits, --memory, --max-loss or --preset")
    if preset is None:
        return Start(Budget(**given, context=context, batch=batch), None, None, CacheSettings())
    try:
        return preset_start(preset)
    except StateError as error:
        raise typer.BadParameter(str(error)) from error


def _caches(
    base: CacheSettings, overrides: dict[str, Any], group_sizes: tuple[int | str, ...] | None
) -> list[CacheSettings]:
    """Cache settings with the options that were given, one for each group size. Raises typer.BadParameter."""
    from ..plan import CacheSettings
    from ..plan.document import reason
    from ..plan.windows import parse_window

    if "window" in overrides:
        overrides["window"] = parse_window(overrides["window"])
    settings = {**base.model_dump(), **overrides}
    try:
        return [
            CacheSettings.model_validate({**settings, "group_size": size}) for size in group_sizes or [base.group_size]
        ]
    except ValueError as error:
        raise typer.BadParameter(reason(error)) from error


def _with_presets(cache: CacheSettings, presets: list[str], page: int | None) -> CacheSettings:
    """The cache with what presets do besides choosing widths. Raises PlanError if it cannot be on the page given."""
    from ..errors import PlanError
    from ..studies.selection import with_presets

    settings = with_presets(cache, presets, "this plan")
    if page not in (None, settings.page):
        raise PlanError(f"{' and '.join(presets)} cannot go with pages of {page} tokens; leave out --page")
    return settings


def _default_name(method: str, budget: Budget, preset: str | None, seed: int) -> str:
    """The method and what was asked for: `rank-2.3`, `ilp-stored-3`, `rank-8GiB-32768x1`, `ilp-max-loss-0.5pct`."""
    from ..allocation import METHODS
    from ..plan.sizes import format_bytes

    if preset is not None:
        parts = [preset] if method == "rank" else [preset, method]
    elif budget.memory is not None:
        parts = [method, format_bytes(budget.memory).replace(" ", ""), f"{budget.context}x{budget.batch}"]
    elif budget.max_loss is not None:
        parts = [method, f"max-loss-{100 * budget.max_loss:g}pct"]
    else:
        parts = [method, f"{budget.limit:g}" if budget.stored_bits is None else f"stored-{budget.limit:g}"]
    return "-".join([*parts, *([f"seed{seed}"] if "seed" in METHODS[method].uses else [])])


def _show_family(plans: list[Plan], family: str, command: str, context: int, batch: int) -> None:
    from ..reporting.family import family_json, family_table, member_name

    paths = [state.plan_path(plan.model.id, member_name(plan, family)) for plan in plans]
    named = [(plan.save(path, command), plan) for path, plan in zip(paths, plans, strict=True)]
    console.table(*family_table(named))
    console.emit_json({"command": "allocate", **family_json(named, context, batch)})


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


def _file_name(name: str | None) -> str | None:
    """Raise typer.BadParameter for a name that is no plain file name."""
    if name is not None and not re.fullmatch(r"[\w][\w.+-]*", name):
        raise typer.BadParameter(f"'{name}' is no name for a plan; use --out to write to another folder")
    return name
