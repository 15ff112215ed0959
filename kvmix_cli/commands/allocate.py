"""`kvmix allocate`: from the scores of a profile to a plan under a budget."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console, state
from . import options

if TYPE_CHECKING:
    from ..allocation import Preset
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
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="paper: 20 % of the layers at K 3 / V 4 bits, the rest at 2.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that bytes are counted at.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences that bytes are counted at.")] = 1,
    method: Annotated[str, typer.Option(metavar="NAME", help="rank (the paper), uniform or random.")] = "rank",
    k_bits: Annotated[
        Any, typer.Option(metavar="LIST", parser=options.parse_bits, help="Widths for keys [default: 2,3,4,8].")
    ] = None,
    v_bits: Annotated[
        Any, typer.Option(metavar="LIST", parser=options.parse_bits, help="Widths for values [default: 2,4,8].")
    ] = None,
    group_size: Annotated[
        str | None, typer.Option(metavar="N", help="Elements that share a scale, or row for all [default: 64].")
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
    score: Annotated[
        str | None, typer.Option(metavar="NAME", help="Score to use [default: grad-norm, or the profile's only one].")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", callback=_file_name, help="Of the plan [default: e.g. rank-2.3].")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write [default: plans/NAME.yaml beside the profile].")
    ] = None,
    profile: Annotated[Path | None, typer.Option(metavar="FILE", help="Profile to use [default: the newest].")] = None,
    model: options.Model = None,
    seed: options.Seed = 0,
    profiles_dir: options.ProfilesDir = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Decide every layer's bits under a budget: --avg-bits, --stored-bits, --memory or --preset."""
    from ..allocation import allocate as decide
    from ..profile import Profile
    from .show import plan_json, show_plan

    limits = {"avg_bits": avg_bits, "stored_bits": stored_bits, "memory": memory}
    settings = _settings(preset, limits, context, batch)
    overrides = {"page": page, "sink": sink, "group_size": group_size, "scale_dtype": scale_dtype, "window": window}
    cache = _cache(settings.cache, {key: value for key, value in overrides.items() if value is not None})
    scores = Profile.load(state.find_profile(profile, model=model))
    plan = decide(
        scores,
        settings.budget,
        method=method,
        k_bits=k_bits or settings.k_bits,
        v_bits=v_bits or settings.v_bits,
        cache=cache,
        seed=seed,
        score=score or _default_score(scores),
    )
    path = out or state.plan_path(plan.model.id, name or _default_name(plan, preset))
    plan.save(path, ctx.meta[options.COMMAND_LINE])
    show_plan(plan, path, context, batch)
    console.emit_json(
        {
            "command": "allocate",
            "model": plan.model.id,
            "plan": path,
            "method": method,
            **plan_json(plan, context, batch),
            "provenance": plan.provenance,
        }
    )


def _settings(preset: str | None, limits: dict[str, Any], context: int, batch: int) -> Preset:
    """Budget, ladders and cache before overrides. Raises typer.BadParameter unless exactly one budget is given."""
    from ..allocation import K_BITS, PRESETS, V_BITS, Budget, Preset
    from ..errors import did_you_mean
    from ..plan import CacheSettings

    given = {key: limit for key, limit in limits.items() if limit is not None}
    if len(given) + (preset is not None) != 1:
        raise typer.BadParameter("give exactly one budget: --avg-bits, --stored-bits, --memory or --preset")
    if preset is None:
        return Preset(Budget(**given, context=context, batch=batch), K_BITS, V_BITS, CacheSettings())
    if preset not in PRESETS:
        hint = did_you_mean(preset, PRESETS) or f"; there is {', '.join(PRESETS)}"
        raise typer.BadParameter(f"unknown preset '{preset}'{hint}")
    return PRESETS[preset]


def _cache(base: CacheSettings, overrides: dict[str, Any]) -> CacheSettings:
    """Cache settings with the options that were given. Raises typer.BadParameter for a bad value."""
    from ..files import reason
    from ..plan import CacheSettings
    from ..windows import parse_window

    if str(overrides.get("group_size", "")).isdecimal():
        overrides["group_size"] = int(overrides["group_size"])
    if "window" in overrides:
        overrides["window"] = parse_window(overrides["window"])
    try:
        return CacheSettings.model_validate({**base.model_dump(), **overrides})
    except ValueError as error:
        raise typer.BadParameter(reason(error)) from error


def _default_score(profile: Profile) -> str:
    return "grad-norm" if len(profile.scores) > 1 else next(iter(profile.scores))


def _default_name(plan: Plan, preset: str | None) -> str:
    """The method and what was asked for: `rank-2.3`, `rank-8GiB-32768x1`, `paper`, `random-2.3-seed1`."""
    from ..budget import format_bytes

    method, budget = plan.provenance["method"], plan.provenance["budget"]
    if preset is not None:
        parts = [preset] if method == "rank" else [preset, method]
    elif "memory" in budget:
        size = format_bytes(budget["memory"]).replace(" ", "")
        parts = [method, size, f"{budget['context']}x{budget['batch']}"]
    else:
        parts = [method, *(f"{limit:g}" if key == "avg_bits" else f"stored-{limit:g}" for key, limit in budget.items())]
    return "-".join([*parts, *([f"seed{plan.provenance['seed']}"] if "seed" in plan.provenance else [])])


def _file_name(name: str | None) -> str | None:
    """Raise typer.BadParameter for a name that is no plain file name."""
    if name is not None and not re.fullmatch(r"[\w][\w.+-]*", name):
        raise typer.BadParameter(f"'{name}' is no name for a plan; use --out to write to another folder")
    return name
