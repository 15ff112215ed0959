"""Options of an allocation: their defaults, their checks, and the problem that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from ..errors import BudgetError, StateError
from ..plan import WIDTHS, CacheSettings, GroupSize, LayerPlan
from ..plan.codec import TransformSettings
from ..plan.document.strict_yaml import reason
from ..plan.engine_blocks import engine_cache
from ..plan.presets import ALIASES, Preset, find_preset, presets
from ..plan.tensors.basis import BasisFile
from ..plan.tensors.directions import Directions
from ..plan.tokens import TokenShares
from ..profile import Profile, Score
from ..state import profile_command
from .bases import SCORE
from .budgets import Budget
from .evictions import with_evictions
from .problem import Problem
from .solvers import METHODS, TRANSFORM

K_BITS = (2, 3, 4, 8)
V_BITS = (2, 4, 8)
"""Widths of the paper up to 3.5 bits, and wider ones above. Methods that weigh choices have `K_BITS` for both."""
SCORES = ("fisher", "kl", "loss", "taylor", "error", "grad-norm")
"""Scores in order of preference: `fisher` predicts as well as `kl`, and knows all widths and groups."""
PAPER_SCORE = "grad-norm"
EXACT = 1
"""Tokens of each page and KV head that transform codes keep exact where a profile says nothing of them."""


class AllocationOptions(TypedDict, total=False):
    """Options of `allocate`, `frontier` and `refine`.

    Attributes:
        k_bits, v_bits: widths to choose from; by default `K_BITS` and, for methods that weigh no choices, `V_BITS`.
        min_bits, max_bits: the narrowest and the widest of these to use.
        group_sizes: group sizes to choose from. The first is the cache's own; other methods use no other.
        cache: settings of the plan; by default `default_cache`.
        score: score of the profile that decides; by default `default_score`.
        pins: layers that are decided already; their cost is part of the plan's.
        seed: seed of methods that draw at random.
        basis: directions of the layers, which method `transform` needs; see `bases.make_bases`.
        exact: tokens of each page and KV head that transform codes keep exact; None for `exact.best_exact`.
        code_bits: widths that a direction of transform codes may have besides 0; None for all.
        by_head: decide about every KV head by itself, by a score that has heads; for method `ilp`.
        evict: shares of tokens to evict that every layer chooses from, by a score that has measured them; likewise.
    """

    k_bits: Sequence[int] | None
    v_bits: Sequence[int] | None
    min_bits: int | None
    max_bits: int | None
    group_sizes: Sequence[GroupSize] | None
    cache: CacheSettings | None
    score: str | None
    pins: Mapping[int, LayerPlan] | None
    seed: int
    basis: BasisFile | None
    exact: int | None
    code_bits: tuple[int, ...] | None
    by_head: bool
    evict: Sequence[float] | None


@dataclass(frozen=True)
class Start:
    """A budget with the widths and the cache to begin from.

    Attributes:
        k_bits, v_bits: widths to choose from; None for the method's own.
        method: method that decides if none is named; None for the profile's default.
        directions: where directions of transform codes come from.
        code_bits: widths that they may have besides 0; None for all.
    """

    budget: Budget
    k_bits: tuple[int, ...] | None
    v_bits: tuple[int, ...] | None
    cache: CacheSettings
    method: str | None = None
    directions: Directions = "loss"
    code_bits: tuple[int, ...] | None = None


def preset_start(name: str) -> Start:
    """Return the budget, widths and cache of a preset whose bits a profile is to place.

    Such a preset gives a share of the layers more bits, or has a method of allocation.

    Raises:
        StateError: if there is no such preset, or it leaves nothing to decide.
        DocumentError: if its file is faulty.
    """
    start = _start(find_preset(name))
    if start is None:
        able = [each for each in (*ALIASES, *presets()) if _start(find_preset(each)) is not None]
        raise StateError(f"preset '{name}' has the same widths in all layers or no common share; use {', '.join(able)}")
    return start


def _start(preset: Preset) -> Start | None:
    if preset.avg_bits is not None:
        budget = Budget(avg_bits=preset.avg_bits)
        return Start(budget, None, None, preset.cache, preset.method, preset.directions, preset.code_bits)
    share = preset.layer_share
    if share is None:
        return None
    return Start(Budget(share=share.share), share.k_bits, share.v_bits, preset.cache, "rank")


def default_method(profile: Profile) -> str:
    """Return `transform` if the profile has directions, `ilp` if a score knows widths, otherwise the paper's `rank`."""
    if SCORE in profile.scores and profile.scores[SCORE].moments is not None:
        return TRANSFORM
    return "ilp" if any(any(score.choices) for score in profile.scores.values()) else "rank"


def default_score(profile: Profile, method: str) -> str:
    """Return the score that decides if none is named: for `rank` the paper's if there is one, else by preference."""
    if method == TRANSFORM:
        return SCORE
    wanted = (PAPER_SCORE, *SCORES) if method == "rank" else SCORES
    return next((name for name in wanted if name in profile.scores), next(iter(profile.scores)))


def default_cache(profile: Profile, method: str) -> CacheSettings:
    """Return the cache that a plan has if none is given.

    Transform codes of moments that count all pairs are for engines.
    """
    if method == TRANSFORM and SCORE in profile.scores and profile.scores[SCORE].is_for_engines:
        return engine_cache()
    return CacheSettings()


def default_exact(score: Score) -> int:
    """Return the exact tokens of a page if nothing is known of their worth; engines keep none."""
    return 0 if score.is_for_engines else EXACT


def make_problem(
    profile: Profile,
    budget: Budget,
    method: str,
    *,
    k_bits: Sequence[int] | None = None,
    v_bits: Sequence[int] | None = None,
    min_bits: int | None = None,
    max_bits: int | None = None,
    group_sizes: Sequence[GroupSize] | None = None,
    cache: CacheSettings | None = None,
    score: str | None = None,
    pins: Mapping[int, LayerPlan] | None = None,
    seed: int = 0,
    basis: BasisFile | None = None,
    exact: int | None = None,
    code_bits: tuple[int, ...] | None = None,
    by_head: bool = False,
    evict: Sequence[float] | None = None,
) -> Problem:
    """Return the problem that a method is to solve; options as in `AllocationOptions`.

    Without a number of exact tokens it is `default_exact`.

    Raises:
        BudgetError: if no width is left to choose from, or the score cannot predict the loss that the budget limits.
        DocumentError: if the profile has no such score.
        PlanError: if the model's heads cannot be packed.
    """
    uses, cache, pins = METHODS[method].uses, cache or default_cache(profile, method), dict(pins or {})
    if by_head and "heads" not in uses:
        raise BudgetError(f"method {method} does not decide by KV head; use --method ilp, or leave out --by-head")
    if evict and ("evictions" not in uses or by_head):
        raise BudgetError("shares to evict need --method ilp, and go without --by-head")
    evictions = tuple(sorted(set(evict or ())))
    if evictions:
        cache = with_evictions(cache, evictions)
        pins = {layer: pin.model_copy(update={"tokens": TokenShares(evict=0.0)}) for layer, pin in pins.items()}
    weighs = "group_sizes" in uses
    sizes = tuple(dict.fromkeys(group_sizes or (cache.group_size,)))
    basis = _needed_basis(profile, method, basis, score)
    if basis is not None:
        cache = _with_basis(cache, basis, default_exact(profile.score(SCORE)) if exact is None else exact)
    problem = Problem(
        profile=profile,
        score_name=score or default_score(profile, method),
        budget=budget,
        cache=_with_group_sizes(cache, sizes)[0],
        k_bits=_widths("k_bits", K_BITS if k_bits is None else k_bits, min_bits, max_bits),
        v_bits=_widths("v_bits", (K_BITS if weighs else V_BITS) if v_bits is None else v_bits, min_bits, max_bits),
        group_sizes=sizes if weighs else sizes[:1],
        pins=pins,
        seed=seed,
        basis=basis,
        code_bits=code_bits,
        by_head=by_head,
        evictions=evictions,
    )
    _check_loss(problem, method)
    return problem


def _needed_basis(profile: Profile, method: str, basis: BasisFile | None, score: str | None) -> BasisFile | None:
    """Return the basis if the method has a use for one.

    Raises:
        BudgetError: if the method needs a basis that is not there, or is to decide by another score.
    """
    if "basis" not in METHODS[method].uses:
        return None
    if basis is None:
        command = profile_command(profile.model.id, "--score", SCORE)
        raise BudgetError(f"method {method} needs directions: measure them with `{command}`")
    if score not in (None, SCORE):
        raise BudgetError(f"method {method} decides by score {SCORE}, not by '{score}': leave out --score")
    return basis


def _check_loss(problem: Problem, method: str) -> None:
    """Raise BudgetError for a limit of a loss that the method, or the score, cannot predict."""
    if problem.budget.max_loss is None:
        return
    if problem.basis is not None and problem.pins:
        raise BudgetError(f"method {method} cannot predict the loss of pinned layers; leave out --pin or --max-loss")
    if problem.basis is None and not problem.score.predicts_loss:
        profile = problem.profile
        able = [name for name, each in profile.scores.items() if each.predicts_loss]
        measure = f"measure one that does with `{profile_command(profile.model.id, '--score', 'fisher')}`"
        advice = f"use --score {' or '.join(able)}" if able else measure
        raise BudgetError(
            f"score '{problem.score_name}' does not predict a loss, so it cannot keep to --max-loss: {advice}"
        )


def _widths(name: str, widths: Sequence[int], least: int | None, most: int | None) -> tuple[int, ...]:
    """Return widths within the bounds, ascending, without repetition."""
    if not widths or any(bits not in WIDTHS for bits in widths):
        known = ", ".join(map(str, WIDTHS))
        raise BudgetError(f"{name} must be taken from {known}, got {', '.join(map(str, widths)) or 'nothing'}")
    ascending = sorted(set(widths))
    low = ascending[0] if least is None else least
    high = ascending[-1] if most is None else most
    kept = tuple(bits for bits in ascending if low <= bits <= high)
    if not kept:
        bounds = f"{low} to {high} bits: widen --min-bits and --max-bits"
        raise BudgetError(f"{name} {', '.join(map(str, ascending))} have none of {bounds}")
    return kept


def _with_group_sizes(cache: CacheSettings, sizes: Sequence[GroupSize]) -> list[CacheSettings]:
    try:
        return [CacheSettings.model_validate({**cache.model_dump(), "group_size": size}) for size in sizes]
    except ValueError as error:
        raise BudgetError(reason(error)) from error


def _with_basis(cache: CacheSettings, basis: BasisFile, exact: int) -> CacheSettings:
    """Return the cache with a basis, which is named by its checksum."""
    frame = basis.frame if basis.rope else None
    sha256 = basis.sha256
    try:
        settings = TransformSettings(basis=f"basis-{sha256[:12]}.safetensors", sha256=sha256, frame=frame, exact=exact)
        return CacheSettings.model_validate({**cache.model_dump(), "transform": settings.model_dump()})
    except ValueError as error:
        raise BudgetError(reason(error)) from error
