"""Baselines of `--baseline`: caches of other libraries, and plans that no score has decided."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import EvaluationError, did_you_mean
from ..plan import WIDTHS, Plan

if TYPE_CHECKING:
    from ..cache.subject import Subject
    from ..models.loading import LoadedModel

ALL = "all"
IN_ENGINE = "in-engine"
"""The first plan as a serving engine holds it: every token by itself."""
UNIFORM = re.compile(r"uniform-([0-9]{1,2})")
RANDOM = re.compile(r"random-plan(?:-([0-9]{1,9}))?")


def check_baselines(names: Sequence[str]) -> None:
    """Raise EvaluationError for a name that is not a baseline, or that is there twice."""
    from ..cache.baselines.named import BASELINES

    for name in names:
        if name not in (ALL, IN_ENGINE, *BASELINES) and not _widths(name) and not RANDOM.fullmatch(name):
            known = (*BASELINES, *(f"uniform-{bits}" for bits in WIDTHS), "random-plan", IN_ENGINE, ALL)
            raise EvaluationError(
                f"no baseline '{name}'{did_you_mean(name, known)}; there are {', '.join(BASELINES)}, "
                f"uniform-N with N one of {', '.join(map(str, WIDTHS))}, random-plan, random-plan-SEED, "
                f"{IN_ENGINE}, and {ALL} for the first {len(BASELINES)}"
            )
    _refuse_twice(_each(names), ())


def baseline_subjects(names: Sequence[str], loaded: LoadedModel, plans: Mapping[str, Plan], seed: int) -> list[Subject]:
    """Return what `--baseline` names, as subjects beside those of the plans.

    Raises:
        EvaluationError: for a name that `check_baselines` refuses or that a plan has, or a random plan of nothing.
        PlanError: if the model's heads cannot be packed, or an engine cannot hold the first plan.
    """
    from ..cache.baselines.named import named_cache
    from ..cache.in_engine import EngineBaseline
    from ..cache.subject import Subject

    check_baselines(names)
    _refuse_twice(_each(names), plans)
    subjects = []
    for name in _each(names):
        if name == IN_ENGINE:
            subjects.append(Subject(name, baseline=EngineBaseline(name, _first(plans, name))))
            continue
        plan = _plan(name, loaded, plans, seed)
        if plan is not None:
            subjects.append(Subject(name, plan))
            continue
        cache = named_cache(name, loaded.config, loaded.model.dtype, loaded.device)
        subjects.append(Subject(name, baseline=cache))
    return subjects


def shuffled(plan: Plan, seed: int) -> Plan:
    """Return a plan with the same widths in other layers, drawn at random.

    Keys are exchanged among keys and values among values, so both plans take the same bytes.

    Raises:
        EvaluationError: if all layers are alike, and there is no other order.
    """
    indices = sorted(plan.layers)
    keys, values = ([getattr(plan.layers[index], kind) for index in indices] for kind in "kv")
    if len(set(keys)) == len(set(values)) == 1:
        raise EvaluationError("in every layer it has the same widths, so that every order of them is the plan itself")
    draw, layers = random.Random(seed), plan.layers
    while layers == plan.layers:
        draw.shuffle(keys)
        draw.shuffle(values)
        pairs = zip(indices, keys, values, strict=True)
        layers = {index: plan.layers[index].model_copy(update={"k": k, "v": v}) for index, k, v in pairs}
    return Plan.build(plan.model, layers, plan.cache, {"method": "shuffled", "seed": seed, "of": plan.sha256})


def _plan(name: str, loaded: LoadedModel, plans: Mapping[str, Plan], seed: int) -> Plan | None:
    """Return the plan that a name stands for; None if it is a cache."""
    first = next(iter(plans), None)
    if bits := _widths(name):
        return Plan.uniform(loaded.info, bits, bits, plans[first].cache.plain if first is not None else None)
    match = RANDOM.fullmatch(name)
    if match is None:
        return None
    plan = _first(plans, name)
    try:
        return shuffled(plan, int(match[1] or seed))
    except EvaluationError as error:
        raise EvaluationError(f"{name} would be plan '{first}': {error}; put another --plan first") from error


def _first(plans: Mapping[str, Plan], name: str) -> Plan:
    """Return the first plan. Raises EvaluationError if there is none that a baseline could be made of."""
    if not plans:
        raise EvaluationError(f"{name} needs a plan to be made of: give one with --plan")
    return next(iter(plans.values()))


def _widths(name: str) -> int | None:
    match = UNIFORM.fullmatch(name)
    return int(match[1]) if match and int(match[1]) in WIDTHS else None


def _each(names: Sequence[str]) -> list[str]:
    """Return the names, with those that `all` stands for."""
    from ..cache.baselines.named import BASELINES

    return [each for name in names for each in (BASELINES if name == ALL else (name,))]


def _refuse_twice(names: Sequence[str], taken: Mapping[str, Plan] | tuple[()]) -> None:
    for number, name in enumerate(names):
        if name in taken or name in names[:number]:
            raise EvaluationError(f"two rows would be called '{name}'; leave one out")
