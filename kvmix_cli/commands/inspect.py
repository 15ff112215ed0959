"""`kvmix inspect FILE [FILE2]`: show and validate a profile or plan, or say how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console, state
from ..errors import BudgetError, KvmixError, StateError
from . import options
from .values import output_option

if TYPE_CHECKING:
    from ..plan import ModelInfo, Plan
    from ..profile import Profile
    from ..studies.explain import Explanation, Frontier


@options.expand
def inspect(
    ctx: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A profile, a plan (or its name), or a preset (or its name).")
    ],
    other: Annotated[Path | None, typer.Argument(metavar="FILE2", help="Another of its kind, to compare.")] = None,
    context: Annotated[int, options.count_option("Tokens that bytes are counted at.")] = 32768,
    batch: Annotated[int, options.count_option("Sequences that bytes are counted at.")] = 1,
    plot: Annotated[Path | None, output_option("Also draw what is in the files.", metavar="FILE.png")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="To explain a plan with [default: the newest of its model]."),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="ID", help="Model of a preset, which names none.")] = None,
    common: options.CommonOptions = options.CommonOptions(),
) -> None:
    """Show and validate a profile or plan; with two files, how they differ."""
    from ..plan import Plan

    paths = [_path(each, model) for each in (file, other) if each is not None]
    found = [_load(path, model) for path in paths]
    plans = [each for each in found if isinstance(each, Plan)]
    profiles = [each for each in found if not isinstance(each, Plan)]
    if plans and profiles:
        raise KvmixError(f"{file} and {other} cannot be compared: one is a profile, the other a plan")
    if other is not None or not plans:
        options.say_unused(ctx, ["context", "batch", "profile"], "is for one plan")
    if other is not None:
        if plot is not None:
            _plot(paths, plans, profiles, None, plot)
        _compare((paths[0], paths[1]), plans, profiles)
        return
    reasons = _explain(plans[0], paths[0], profile) if plans else None
    if plot is not None:
        _plot(paths, plans, profiles, reasons, plot)
    for plan in plans:
        _show_plan(paths[0], plan, reasons, context, batch)
    for each in profiles:
        _show_profile(paths[0], each)


def _path(given: Path, model: str | None) -> Path:
    """Return a file, or the plan or preset of that name. Raises StateError if there is none."""
    from ..plan.presets import has_preset, preset_path

    if given.exists() or given.suffix in (".yaml", ".yml"):
        return given
    try:
        return state.find_plan(given, model=model, say=console.notice)
    except StateError:
        if has_preset(str(given)):
            return preset_path(str(given))
        raise


def _load(path: Path, model: str | None) -> Plan | Profile:
    """Read a file of any kind.

    Raises:
        DocumentError: with all of its faults.
        PlanError: if a file that a plan names is missing, or another one.
    """
    from .. import profile
    from ..plan import plan
    from ..plan import presets as preset
    from ..plan.document.strict_yaml import read_yaml
    from ..plan.engines.kvtuner import is_kvtuner
    from ..plan.engines.modelopt import is_modelopt

    document = read_yaml(path)
    if is_kvtuner(document):
        return plan.Plan.from_kvtuner(path, _model_of("KVTuner preset", path, model))
    if is_modelopt(document):
        return plan.Plan.from_modelopt(path, _model_of("map of ModelOpt", path, model))
    form = document.data.get("format") if isinstance(document.data, dict) else None
    if form == plan.FORMAT:
        from ..plan.tensor_files import check_files

        found = plan.Plan.load(path)
        check_files(found)
        return found
    if form == profile.FORMAT:
        return profile.Profile.load(path)
    if form == preset.FORMAT:
        from ..studies.directions import preset_plan

        return preset_plan(preset.Preset.load(path), path.stem, _model_of("preset", path, model), console.notice)
    expected = f"format must be '{plan.FORMAT}' or '{profile.FORMAT}'"
    raise document.error([(("format",), f"neither a plan nor a profile: {expected}")])


def _model_of(what: str, path: Path, model: str | None) -> ModelInfo:
    """Return the model for a file that names none. Raises KvmixError if `--model` does not name one."""
    from ..models.loading import load_info

    if model is None:
        raise KvmixError(f"{path} is a {what}, which does not name its model: add --model ID")
    return load_info(model)


def _explain(plan: Plan, file: Path, given: Path | None) -> Explanation | None:
    """Explain a plan by the profile given, or by the one beside the plan's file or of its model, if it fits.

    Raises:
        StateError, DocumentError, PlanError: if the profile given is missing, faulty, or of another model.
    """
    from ..profile import Profile
    from ..studies.explain import explain_plan

    beside = file.parent.parent / state.PROFILE
    is_beside = file.parent.name == state.PLANS and beside.is_file()
    try:
        path = state.find_profile(given or (beside if is_beside else None), model=plan.model.id, say=console.notice)
        found = explain_plan(plan, Profile.load(path), path)
    except KvmixError as error:
        if given is not None:
            raise
        if not isinstance(error, StateError):
            console.notice(f"not explained: {error}")
        return None
    for sentence in found.notices:
        console.notice(sentence)
    return found


def _frontier(reasons: Explanation | None) -> Frontier | None:
    try:
        return None if reasons is None else reasons.frontier()
    except BudgetError as error:
        console.notice(f"no frontier: {error}")
        return None


def _show_plan(path: Path, plan: Plan, reasons: Explanation | None, context: int, batch: int) -> None:
    from ..reporting.tables.explain import explanation_json, explanation_table
    from ..reporting.tables.plans import plan_json, plan_table, stated_loss

    data = {
        **_head(path, plan),
        "kind": "plan",
        "cache": plan.cache.model_dump(mode="json"),
        **plan_json(plan, context, batch),
    }
    if reasons is None:
        console.table(*plan_table(plan, path, context, batch, stated_loss(plan)))
    else:
        console.table(*explanation_table(reasons, path, context, batch))
        data["explanation"] = explanation_json(reasons)
    console.emit_json(data)


def _show_profile(path: Path, profile: Profile) -> None:
    from ..reporting.tables.outliers import outlier_table
    from ..reporting.tables.plans import outliers_json, profile_tables, score_json
    from ..reporting.tables.spectrum import spectrum_json, spectrum_table
    from ..studies.spectrum import measure_spectra

    spectra = measure_spectra(profile, path.parent)
    for table in profile_tables(profile, path, ascii_only=not console.is_unicode()):
        console.table(*table)
    if (outliers := outlier_table(profile)) is not None:
        console.table(*outliers)
    scores: dict[str, dict[str, Any]] = {
        name: {"seconds": score.seconds, "calibration": score.calibration.model_dump(), "layers": score_json(score)}
        for name, score in profile.scores.items()
    }
    for spectrum in spectra:
        console.table(*spectrum_table(spectrum, profile.model.id, path.parent))
        for sentence in spectrum.notices:
            console.notice(sentence)
        scores[spectrum.score]["moments"] = spectrum_json(spectrum)
    console.emit_json({**_head(path, profile), "kind": "profile", "scores": scores, **outliers_json(profile)})


def _head(path: Path, found: Plan | Profile) -> dict[str, Any]:
    return {"command": "inspect", "file": path, "model": found.model.id, "provenance": found.provenance}


def _compare(paths: tuple[Path, Path], plans: list[Plan], profiles: list[Profile]) -> None:
    from ..reporting.tables.compare import plans_json, plans_table, profiles_json, profiles_tables
    from ..studies.compare import compare_plans, compare_profiles

    if plans:
        plan_difference = compare_plans(plans[0], plans[1])
        tables, data = [plans_table(plan_difference, paths)], plans_json(plan_difference)
    else:
        profile_difference = compare_profiles(profiles[0], profiles[1], paths)
        tables, data = profiles_tables(profile_difference, paths), profiles_json(profile_difference)
    for table in tables:
        console.table(*table)
    kind = "plan" if plans else "profile"
    console.emit_json({"command": "inspect", "kind": kind, "files": list(paths), **data})


def _plot(
    paths: list[Path], plans: list[Plan], profiles: list[Profile], reasons: Explanation | None, picture: Path
) -> None:
    from ..reporting.plots.plans import check_plot, plot_plans, plot_profiles

    check_plot(picture)
    names = [path.stem for path in paths]
    if plans:
        plot_plans(list(zip(names, plans, strict=True)), picture, _frontier(reasons))
    else:
        plot_profiles(list(zip(names, profiles, strict=True)), picture)
