"""`kvmix inspect FILE [FILE2]`: show and validate a profile or plan, or say how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console, state
from ..errors import KvmixError, StateError
from . import options

if TYPE_CHECKING:
    from ..plan import ModelInfo, Plan
    from ..profile import Profile
    from ..studies.explain import Explanation


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A profile, a plan (or its name), or a preset (or its name).")
    ],
    other: Annotated[Path | None, typer.Argument(metavar="[FILE2]", help="Another of its kind, to compare.")] = None,
    context: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that bytes are counted at.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences that bytes are counted at.")] = 1,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw what is in the files.")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="To explain a plan with [default: the newest of its model]."),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="ID", help="Model of a preset, which names none.")] = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Show and validate a profile or plan; with two files, how they differ."""
    paths = [_path(each, model) for each in (file, other) if each is not None]
    found = [_load(path, model) for path in paths]
    if len({type(each) for each in found}) > 1:
        raise KvmixError(f"{file} and {other} cannot be compared: one is a profile, the other a plan")
    reasons = _explanation(paths, found, profile)
    if plot is not None:
        _plot(paths, found, reasons, plot)
    if len(found) > 1:
        _compare(paths, found)
    else:
        _show(paths[0], found[0], reasons, context, batch)


def _path(given: Path, model: str | None) -> Path:
    """A file, or the plan or preset of that name. Raises StateError if there is none."""
    from ..plan.presets import presets

    if given.exists() or given.suffix in (".yaml", ".yml"):
        return given
    try:
        return state.find_plan(given, model=model)
    except StateError:
        if preset := presets().get(str(given)):
            return preset
        raise


def _load(path: Path, model: str | None) -> Plan | Profile:
    """Read a file of any kind that there is. Raises DocumentError with all of its faults."""
    from .. import profile
    from ..plan import plan
    from ..plan import presets as preset
    from ..plan.document import read_yaml

    document = read_yaml(path)
    if plan.is_kvtuner(document):
        return plan.Plan.from_kvtuner(path, _model_of("KVTuner preset", path, model))
    form = document.data.get("format") if isinstance(document.data, dict) else None
    if form == plan.FORMAT:
        return plan.Plan.load(path)
    if form == profile.FORMAT:
        return profile.Profile.load(path)
    if form == preset.FORMAT:
        return preset.Preset.load(path).plan(_model_of("preset", path, model), path.stem)
    expected = f"format must be '{plan.FORMAT}' or '{profile.FORMAT}'"
    raise document.error([(("format",), f"neither a plan nor a profile: {expected}")])


def _model_of(what: str, path: Path, model: str | None) -> ModelInfo:
    """The model to show a file for that names none. Raises KvmixError if nothing does, ModelError if it has no such."""
    from ..models.loading import load_info

    if model is None:
        raise KvmixError(f"{path} is a {what}, which does not name its model: add --model ID")
    return load_info(model)


def _explanation(paths: list[Path], found: list[Any], profile: Path | None) -> Explanation | None:
    """The reasons of a single plan. Raises KvmixError if the profile that is given does not explain it."""
    from ..plan import Plan
    from ..studies.explain import explanation

    is_plan = len(found) == 1 and isinstance(found[0], Plan)
    return explanation(found[0], paths[0], profile) if is_plan else None


def _show(path: Path, found: Plan | Profile, reasons: Explanation | None, context: int, batch: int) -> None:
    from ..plan import Plan

    head = {"command": "inspect", "file": path, "model": found.model.id, "provenance": found.provenance}
    more = _show_plan(path, found, reasons, context, batch) if isinstance(found, Plan) else _show_profile(path, found)
    console.emit_json({**head, **more})


def _show_plan(path: Path, plan: Plan, reasons: Explanation | None, context: int, batch: int) -> dict[str, Any]:
    from ..reporting.tables import plan_json, show_plan
    from ..studies.explain import explanation_json, show_explained

    data = {"kind": "plan", "cache": plan.cache.model_dump(mode="json"), **plan_json(plan, context, batch)}
    if reasons is None:
        show_plan(plan, path, context, batch)
        return data
    show_explained(plan, reasons, path, context, batch)
    return {**data, "explanation": explanation_json(reasons)}


def _show_profile(path: Path, profile: Profile) -> dict[str, Any]:
    from ..reporting.tables import score_json, show_profile

    show_profile(profile, path)
    scores = {
        name: {"seconds": score.seconds, "calibration": score.calibration.model_dump(), "layers": score_json(score)}
        for name, score in profile.scores.items()
    }
    return {"kind": "profile", "scores": scores}


def _compare(paths: list[Path], found: list[Any]) -> None:
    from ..plan import Plan
    from ..studies.compare import compare_plans, compare_profiles

    compare = compare_plans if isinstance(found[0], Plan) else compare_profiles
    kind = "plan" if isinstance(found[0], Plan) else "profile"
    console.emit_json({"command": "inspect", "kind": kind, "files": paths, **compare(paths, *found)})


def _plot(paths: list[Path], found: list[Any], reasons: Explanation | None, picture: Path) -> None:
    from ..plan import Plan
    from ..reporting.plots import check_plot, plot_plans, plot_profiles

    check_plot(picture)
    named = list(zip([path.stem for path in paths], found, strict=True))
    if isinstance(found[0], Plan):
        plot_plans(named, picture, reasons.frontier(found[0]) if reasons else None)
    else:
        plot_profiles(named, picture)
