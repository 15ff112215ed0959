"""`kvmix allocate`: from the scores of a profile to a plan under a budget, or to a family of plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .. import console, state
from ..counting import counted
from ..files import after_saving
from .allocate_options import (
    FAMILY,
    PAPER,
    SEARCH,
    TRANSFORM,
    BudgetOptions,
    PlanFileOptions,
    SearchOptions,
    StorageOptions,
    default_name,
    options_hash,
)
from .dry_run import show_work
from .options import COMMAND_LINE, CommonOptions, LoadingOptions, expand, given, say_unused

if TYPE_CHECKING:
    from ..allocation import AllocationOptions, Budget, Start
    from ..plan import CacheSettings, Plan
    from ..profile import Profile


OF_SEARCH = ("trials", "calibration", "samples", "resume", "dtype", "device", "trust_remote_code", "allow_pickle")
"""Options of the method that measures plans."""
OF_WIDTHS, OF_GROUPS = ("k_bits", "v_bits", "min_bits", "max_bits"), ("group_size", "encode")
"""Options of methods that choose one width for a whole tensor, and of tensors that are stored in groups."""


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
    if budget.method == FAMILY and files.dry_run:
        raise typer.BadParameter("pareto decides in about a second and takes no budget to try: leave out --dry-run")
    if budget.method == FAMILY and files.out is not None:
        raise typer.BadParameter("pareto writes several plans; use --name instead of --out")
    request = _request(budget, storage, effort, files, loading.seed)
    _say_unused(ctx, request.method, storage, files)
    folder = _plans_folder(request.path, files.profile, request.source)
    command = ctx.meta[COMMAND_LINE]
    if request.method == FAMILY:
        _allocate_family(request, budget, storage, effort, files, folder, command)
        return
    named = request.source if files.profile else None
    name = files.name or default_name(request.method, budget, storage, effort, loading.seed, named)
    path = files.out or folder / f"{name}.yaml"
    if files.dry_run:
        _show_work(request, path, effort, loading)
        return
    plan = _completed(_decide(request, path, effort, loading), request.source, budget, storage, effort)
    if plan.cache.transform is not None and (basis := request.chosen.get("basis")) is not None:
        basis.save(path.parent / plan.cache.transform.basis)
    _save(plan, path, command)
    with after_saving(f"the plan is saved in {path}"):
        _show(plan, request.source, path, budget.context, budget.batch)


@dataclass(frozen=True)
class _Request:
    """Request of one run of the command: what is to be decided, from which profile.

    Attributes:
        source: the profile.
        path: file of the profile.
        chosen: options of the method.
    """

    source: Profile
    path: Path
    method: str
    budget: Budget
    chosen: AllocationOptions


def _request(
    budget: BudgetOptions, storage: StorageOptions, effort: SearchOptions, files: PlanFileOptions, seed: int
) -> _Request:
    """Return what the options ask for, and say which method decides if none is named. Raises KvmixError."""
    base = _base(budget)
    storage.caches(base.cache)  # refuses what is wrong before anything is read
    from ..allocation import default_cache, default_method
    from ..profile import Profile
    from ..studies.directions import read_basis

    path = state.find_profile(files.profile, model=files.model, say=console.notice)
    source = Profile.load(path)
    state.check_owner(path, source.model.id, files.model)
    method = budget.method or base.method or default_method(source)
    if budget.method is None and base.method is None:
        _say_method(method, source)
    cache = default_cache(source, method) if budget.preset is None else base.cache
    caches = [_with_presets(each, storage) for each in storage.caches(cache)]
    chosen = _choices(source, method, base, storage, caches, effort.score, seed)
    if method == TRANSFORM:
        chosen["basis"] = read_basis(source, path.parent, base.directions)
    return _Request(source, path, method, base.budget, chosen)


def _allocate_family(
    request: _Request,
    budget: BudgetOptions,
    storage: StorageOptions,
    effort: SearchOptions,
    files: PlanFileOptions,
    folder: Path,
    command: str,
) -> None:
    """Decide, write and show plans along the whole range of bits."""
    from ..allocation import frontier
    from ..plan.presets import by_depth

    presets, named = storage.put_on or [], request.source if files.profile else None
    family = files.name or "+".join([FAMILY, *presets])
    options = "" if files.name else options_hash(request.method, storage, effort, named)
    plans = [by_depth(plan, presets) for plan in frontier(request.source, **request.chosen)]
    _show_family(plans, family, options, folder, command, budget)


def _completed(
    plan: Plan, source: Profile, budget: BudgetOptions, storage: StorageOptions, effort: SearchOptions
) -> Plan:
    """Return a plan with what is decided after its widths: presets by depth, and tokens of each KV head."""
    from ..plan.presets import by_depth

    if storage.put_on:
        plan = by_depth(plan, storage.put_on)
        plan = plan.model_copy(update={"provenance": {**plan.provenance, "with": storage.put_on}})
        if budget.memory is None:
            console.notice(
                f"the budget is of the layers' own bits; the table counts {' and '.join(storage.put_on)}, too"
            )
    if storage.by_head is not None:
        plan = _by_head(plan, source, effort.score, budget.context, *storage.by_head)
    return plan


def _say_unused(ctx: typer.Context, method: str, storage: StorageOptions, files: PlanFileOptions) -> None:
    """Say which of the options given do nothing for a method."""
    from ..allocation import METHODS

    uses = METHODS[method].uses
    if method != SEARCH:
        say_unused(ctx, OF_SEARCH, "is for --method search, which alone loads the model")
    if "seed" not in uses:
        say_unused(ctx, ["seed"], f"is for what is drawn at random, and method {method} draws nothing")
    if "basis" in uses:
        unused = OF_WIDTHS if storage.pin else OF_WIDTHS + OF_GROUPS
        say_unused(ctx, unused, f"is for widths and groups of whole tensors, and method {method} codes directions")
    else:
        say_unused(ctx, ["exact"], f"is for --method {TRANSFORM}")
    if files.out is not None:
        say_unused(ctx, ["name"], "is for a plan without --out")


def _say_method(method: str, source: Profile) -> None:
    """Say which method decides where none was named, and what would make it another one."""
    from ..allocation import TRANSFORM_SCORE

    if method == PAPER:
        better = state.profile_command(source.model.id, "--score", TRANSFORM_SCORE)
        console.notice(f"method {method}, the paper's; for plans that lose less, run `{better}`")
    else:
        knows = "directions" if method == TRANSFORM else "a score that knows widths"
        console.notice(f"method {method}, since the profile has {knows}; the paper's is --method rank")


def _by_head(plan: Plan, source: Profile, score: str | None, context: int, what: str, number: float) -> Plan:
    """Return a plan whose KV heads have tokens of their own. Raises BudgetError."""
    from ..allocation import default_score, with_budgets, with_whole_heads

    score = score or default_score(source, "ilp")
    if what == "budgets":
        return with_budgets(plan, source, score, number, context)
    return with_whole_heads(plan, source, score, number) if what == "whole" else plan


def _show_work(request: _Request, path: Path, effort: SearchOptions, loading: LoadingOptions) -> None:
    """Show what would be decided; of a search, what would be measured for that."""
    from ..studies.dry_run import allocation_work, search_work

    source = request.source
    if request.method == SEARCH:
        load = partial(loading.load, source.model.id, source.model.revision)
        show_work("allocate", search_work(source, load, effort.trials, effort.samples, path))
    else:
        show_work("allocate", allocation_work(source, request.method, request.budget, request.chosen, path))


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
    from ..allocation import METHODS, default_score, parse_pins

    if len(caches) > 1 and "group_sizes" not in METHODS[method].uses:
        console.notice(f"{method} does not choose among group sizes: all groups have {caches[0].group_size} elements")
    of_heads = method == TRANSFORM and storage.by_head is not None  # which --score is for; directions have their own
    return {
        "k_bits": storage.k_bits or base.k_bits,
        "v_bits": storage.v_bits or base.v_bits,
        "min_bits": storage.min_bits,
        "max_bits": storage.max_bits,
        "pins": parse_pins(storage.pin, source.model) if storage.pin else None,
        "group_sizes": [cache.group_size for cache in caches],
        "cache": caches[0],
        "score": default_score(source, method) if score is None or of_heads else score,
        "seed": seed,
        "exact": storage.exact,
        "code_bits": base.code_bits,
        "evict": storage.evict,
        "by_head": storage.by_head is not None and storage.by_head[0] == "widths",
    }


def _decide(request: _Request, path: Path, effort: SearchOptions, loading: LoadingOptions) -> Plan:
    source = request.source
    if request.method != SEARCH:
        from ..allocation import allocate as decide

        return decide(source, request.budget, method=request.method, **request.chosen)
    from ..files import check_writable
    from ..studies.search import search

    check_writable(path)
    return search(
        source,
        request.budget,
        request.chosen,
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


def _save(plan: Plan, path: Path, command: str) -> Path:
    """Write a plan, and say so if another plan was there. Raises OutputError."""
    from ..errors import DocumentError, OutputError
    from ..files import check_writable
    from ..plan import Plan
    from ..plan.plan import FORMAT

    check_writable(path)
    try:
        is_other = path.is_file() and Plan.load(path).sha256 != plan.sha256
    except DocumentError as error:
        if not state.is_headed(path, FORMAT):
            raise OutputError(f"{path} is there and is no plan: remove it, or name another file with --out") from error
        is_other = True
    plan.save(path, command)
    if is_other:
        console.notice(f"{path} was another plan, and is replaced")
    return path


def _show_family(
    plans: Sequence[Plan], family: str, options: str, folder: Path, command: str, budget: BudgetOptions
) -> None:
    """Write the plans, each whole or not at all, and show them. Raises OutputError."""
    from ..reporting.tables.family import family_json, family_table, member_name

    named: list[tuple[Path, Plan]] = []
    for plan in plans:
        with after_saving(f"{len(named)} of {counted(len(plans), 'plan')} are saved in {folder}"):
            named.append((_save(plan, folder / f"{member_name(plan, family, options)}.yaml", command), plan))
    with after_saving(f"{counted(len(plans), 'plan')} saved in {folder}"):
        console.table(*family_table(named))
        console.emit_json({"command": "allocate", **family_json(named, budget.context, budget.batch)})


def _show(plan: Plan, source: Profile, path: Path, context: int, batch: int) -> None:
    from ..reporting.tables.plans import loss_text, plan_json, plan_table
    from ..studies.explain import settings_notices

    loss, method = plan.provenance.get("predicted_loss"), plan.provenance["method"]
    console.table(*plan_table(plan, path, context, batch))
    if loss is not None:
        name = plan.provenance["score"]
        console.text(f"{loss_text(loss, name, plan.provenance.get('predicted_context'))}\n")
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
