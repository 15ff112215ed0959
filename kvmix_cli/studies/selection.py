"""Which model and which plans the options of `run` and `eval` mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import console, state
from ..errors import EvaluationError, StateError
from ..plan import CacheSettings, ModelInfo, Plan
from ..plan.document import read_yaml
from ..plan.plan import is_kvtuner
from ..plan.presets import KVTUNER, find_preset, plan_of, presets, put_on, split

SHORT_FORM = re.compile(r".*:k\d+v\d+\s*")
RESERVED = "unquantized"


def with_presets(cache: CacheSettings, names: Sequence[str], base: str) -> CacheSettings:
    """A cache with what presets do besides choosing widths, and a notice if they need other pages.

    Args:
        base: what the cache is of, for errors.

    Raises:
        StateError, PlanError: if there is no such preset, or it does not go with what is there.
    """
    for name in names:
        settings = put_on(cache, name, base)
        if settings.page != cache.page:
            console.notice(f"pages of {settings.page} tokens, as {name} needs, instead of {cache.page}")
        cache, base = settings, f"{base} with '{name}'"
    return cache


@dataclass(frozen=True)
class Named:
    """One `--plan` or `--preset`: a kvmix plan, or something that becomes one once the model is known.

    Attributes:
        given: what stands before the presets that are put on it.
        plan: None for the short form, for KVTuner's presets and for our own.
        is_preset: whether `given` is the name of one.
        put_on: names of presets, whose transforms and policies the plan gets as well.
    """

    name: str
    given: str
    plan: Plan | None = None
    is_preset: bool = False
    put_on: tuple[str, ...] = ()

    def resolve(self, info: ModelInfo, cache: CacheSettings | None) -> Plan:
        """The plan for a model. Raises PlanError, or DocumentError for a faulty preset."""
        plan = self._resolve(info, cache)
        if not self.put_on:
            return plan
        base = self.name.removesuffix("".join(f"+{preset}" for preset in self.put_on))
        settings = with_presets(plan.cache, self.put_on, f"'{base}'")
        return Plan.build(plan.model, plan.layers, settings, {**plan.provenance, "with": list(self.put_on)})

    def _resolve(self, info: ModelInfo, cache: CacheSettings | None) -> Plan:
        if self.plan is not None:
            self.plan.check_model(info)
            return self.plan
        if self.is_preset:
            return plan_of(self.given, info)
        if SHORT_FORM.fullmatch(self.given):
            return Plan.from_short(self.given, info, cache)
        return Plan.from_kvtuner(Path(self.given), info, cache)

    @property
    def states_cache(self) -> bool:
        """Whether it says more than widths."""
        return self.plan is not None or self.is_preset


@dataclass(frozen=True)
class Choice:
    """What the options amount to.

    Attributes:
        model: id of the model to load, and its revision.
        named: the plans, in the order given.
        source: the plan whose cache settings hold for plans that state widths only; None for the defaults.
    """

    model: str
    revision: str | None
    named: tuple[Named, ...]
    source: Named | None

    def plans(self, info: ModelInfo, uniform: Sequence[int] = ()) -> dict[str, Plan]:
        """All plans by name, those of `--uniform` last.

        Raises:
            EvaluationError: if two have the same name.
            PlanError, DocumentError: if one does not fit the model.
        """
        cache = self.source.plan.cache.plain if self.source and self.source.plan else None
        if uniform or not all(each.states_cache for each in self.named):
            console.notice(f"page, group and window: {f'as in plan {self.source.name}' if self.source else 'defaults'}")
        found = [(each.name, each.resolve(info, cache)) for each in self.named]
        found += [(f"uniform-{bits}", Plan.uniform(info, bits, bits, cache)) for bits in uniform]
        plans: dict[str, Plan] = {}
        for name, plan in found:
            if name in plans or name == RESERVED:
                raise EvaluationError(f"two rows would be called '{name}'; rename a plan file or leave one out")
            plans[name] = plan
        return plans


def choose(
    given: Sequence[str], presets: Sequence[str] = (), *, model: str | None, revision: str | None, need_plan: bool
) -> Choice:
    """Find the plans and presets that are given, or else the newest plan, and the model they are for.

    Args:
        given: files, names and short forms of plans, with presets that are put on them: `rank-2.3+mikv`.
        presets: names of presets, with others that are put on them: `mikv+rotate-2`.
        need_plan: take the newest plan if none is given. If not (`--uniform`, `--baseline`), the newest one is only
            asked for its model, when that is not named, and for its cache settings.

    Raises:
        StateError: if a plan, a preset or the model cannot be told.
        DocumentError: if a file is faulty.
    """
    named = (*(_named(each, model) for each in given), *map(_preset, presets))
    source = next((each for each in named if each.plan is not None), None)
    if source is None and (model is None or (need_plan and not named)):
        source = _newest(model)
        named = named or ((source,) if need_plan else ())
    if source is None or source.plan is None:
        return Choice(str(model), revision, named, None)
    owner = source.plan.model
    if model in (None, owner.id):
        revision = revision or owner.revision
    return Choice(model or owner.id, revision, named, source)


def _newest(model: str | None) -> Named:
    path = state.find_plan(model=model)
    return Named(path.stem, str(path), Plan.load(path))


def _named(given: str, model: str | None) -> Named:
    """A plan by its file, its name or in short form, with presets that are put on it."""
    base, on = split(given, lambda name: _is_plan(name, model))
    if SHORT_FORM.fullmatch(base):
        return Named(given, base, put_on=on)
    path = _find_plan(base, model)
    plan = None if is_kvtuner(read_yaml(path)) else Plan.load(path)
    return Named("+".join((path.stem, *on)), str(path), plan, put_on=on)


def _is_plan(name: str, model: str | None) -> bool:
    """Whether there is a plan of this very name, or what is meant must be a file."""
    try:
        return state.find_plan(name, model=model) is not None
    except StateError:
        return Path(name).suffix in (".yaml", ".yml")


def _find_plan(name: str, model: str | None) -> Path:
    """The plan's file. Raises StateError, with advice if it is a preset's name."""
    try:
        return state.find_plan(name, model=model)
    except StateError as error:
        if name in presets():
            raise StateError(f"{error}; for the preset: --preset {name}") from error
        raise


def _preset(given: str) -> Named:
    """A preset by its name, or KVTuner's by its file, with others that are put on it."""
    base, on = split(given, lambda name: name.startswith(KVTUNER) and Path(name.removeprefix(KVTUNER)).is_file())
    if base.startswith(KVTUNER):
        name = KVTUNER + Path(base.removeprefix(KVTUNER)).stem
    else:
        find_preset(name := base)
    return Named("+".join((name, *on)), base, is_preset=True, put_on=on)
