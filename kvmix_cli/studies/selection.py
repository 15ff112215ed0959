"""The model and the plans that the options of `run` and `eval` name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import state
from ..errors import EvaluationError, PlanError, StateError
from ..plan import CacheSettings, ModelInfo, Plan
from ..plan.document.fields import known_width
from ..plan.document.strict_yaml import read_yaml
from ..plan.engines.kvtuner import is_kvtuner
from ..plan.engines.modelopt import is_modelopt
from ..plan.presets import KVTUNER, by_depth, find_preset, plan_of, presets, put_on, split
from ..plan.settings import Encode
from ..state import Say, unsaid
from .directions import preset_plan

SHORT_FORM = re.compile(r".*:k\d+v\d+\s*")
RESERVED = "unquantized"
"""Name of the reference row, which no plan can have."""


def with_presets(cache: CacheSettings, names: Sequence[str], base: str, say: Say = unsaid) -> CacheSettings:
    """Return a cache with everything that presets do besides choosing widths; say if they need other pages.

    Args:
        base: the plan whose cache it is, for errors.

    Raises:
        StateError, PlanError: if there is no such preset, or it does not fit what is there.
    """
    for name in names:
        settings = put_on(cache, name, base)
        if settings.page != cache.page:
            say(f"pages of {settings.page} tokens, as {name} needs, instead of {cache.page}")
        cache, base = settings, f"{base} with '{name}'"
    return cache


@dataclass(frozen=True)
class NamedPlan:
    """One `--plan` or `--preset`: a kvmix plan, or something that becomes one once the model is known.

    Attributes:
        name: its name in tables.
        given: its file, short form or preset, without the presets that are put on it.
        plan: None for the short form, for KVTuner's presets and ModelOpt's maps, and for our own presets.
        is_preset: whether `given` is the name of a preset.
        put_on: names of presets, whose transforms and policies the plan gets as well.
    """

    name: str
    given: str
    plan: Plan | None = None
    is_preset: bool = False
    put_on: tuple[str, ...] = ()

    def resolve(self, info: ModelInfo, cache: CacheSettings | None, say: Say = unsaid) -> Plan:
        """Return the plan for a model. Raises PlanError, or DocumentError for a faulty preset."""
        plan = self._resolve(info, cache, say)
        if not self.put_on:
            return plan
        base = self.name.removesuffix("".join(f"+{preset}" for preset in self.put_on))
        settings = with_presets(plan.cache, self.put_on, f"'{base}'", say)
        plan = Plan.build(plan.model, plan.layers, settings, {**plan.provenance, "with": list(self.put_on)})
        return by_depth(plan, self.put_on)

    def _resolve(self, info: ModelInfo, cache: CacheSettings | None, say: Say) -> Plan:
        if self.plan is not None:
            self.plan.check_model(info)
            return self.plan
        if self.is_preset:
            if self.given.startswith(KVTUNER):
                return plan_of(self.given, info)
            return preset_plan(find_preset(self.given), self.given, info, say)
        if SHORT_FORM.fullmatch(self.given):
            return Plan.from_short(self.given, info, cache)
        path = Path(self.given)
        read = Plan.from_modelopt if is_modelopt(read_yaml(path)) else Plan.from_kvtuner
        return read(path, info, cache)

    @property
    def states_cache(self) -> bool:
        """Return whether it says more than widths."""
        return self.plan is not None or self.is_preset


@dataclass(frozen=True)
class Choice:
    """The model and the plans that options name.

    Attributes:
        model: id of the model to load, and its revision.
        named: the plans, in the order given.
        source: the plan that was named and whose cache settings hold for plans that state widths only; None for the
            defaults.
    """

    model: str
    revision: str | None
    named: tuple[NamedPlan, ...]
    source: NamedPlan | None

    def plans(
        self, info: ModelInfo, uniform: Sequence[int] = (), say: Say = unsaid, *, encode: Encode | None = None
    ) -> dict[str, Plan]:
        """Return all plans by name, those of `--uniform` last: `uniform-2`, or `uniform-2-refit` with an encoder.

        Raises:
            EvaluationError: if two have the same name.
            PlanError, DocumentError: if one does not fit the model.
        """
        cache = self.source.plan.cache.plain if self.source and self.source.plan else None
        if uniform or not all(each.states_cache for each in self.named):
            say(f"page, group and window: {f'as in plan {self.source.name}' if self.source else 'defaults'}")
        found = [(each.name, each.resolve(info, cache, say)) for each in self.named]
        alike = cache if encode is None else (cache or CacheSettings()).model_copy(update={"encode": encode})
        suffix = "" if encode is None else f"-{encode}"
        found += [(f"uniform-{bits}{suffix}", Plan.uniform(info, bits, bits, alike)) for bits in uniform]
        plans: dict[str, Plan] = {}
        for name, plan in found:
            if name in plans or name == RESERVED:
                raise EvaluationError(f"two rows would be called '{name}'; rename a plan file or leave one out")
            plans[name] = plan
        return plans


def choose(
    given: Sequence[str],
    presets: Sequence[str] = (),
    *,
    model: str | None,
    revision: str | None,
    need_plan: bool,
    say: Say = unsaid,
) -> Choice:
    """Find the plans and presets that are given, or else the newest plan, and the model they are for.

    Args:
        given: files, names and short forms of plans, with presets that are put on them: `rank-2.3+mikv`.
        presets: names of presets, with others that are put on them: `mikv+rotate-2`.
        need_plan: take the newest plan if none is given. Otherwise (`--uniform`, `--baseline`) the newest plan only
            says which model is meant, and only if none is named.
        say: takes the lines that say which file was taken.

    Raises:
        StateError: if a plan, a preset or the model cannot be determined.
        DocumentError: if a file is faulty.
    """
    named = (*(_named(each, model, say) for each in given), *map(_preset, presets))
    owner = source = next((each for each in named if each.plan is not None), None)
    if need_plan and not named:
        owner = source = _loaded(state.find_plan(model=model, say=say))
        named = (owner,)
    elif owner is None and model is None:
        owner = _loaded(path := state.find_plan())
        say(f"using the model of plan {path}")
    if owner is None or owner.plan is None:
        return Choice(str(model), revision, named, None)
    recorded = owner.plan.model
    if model in (None, recorded.id):
        revision = revision or recorded.revision
    return Choice(model or recorded.id, revision, named, source)


def check_widths(uniform: Sequence[int]) -> None:
    """Raise PlanError for a width of `--uniform` that no plan can have."""
    for bits in uniform:
        try:
            known_width(bits)
        except ValueError as error:
            raise PlanError(f"--uniform {bits}: {error}") from error


def _loaded(path: Path) -> NamedPlan:
    return NamedPlan(path.stem, str(path), Plan.load(path))


def _named(given: str, model: str | None, say: Say) -> NamedPlan:
    """Return a plan by its file, its name or in short form, with presets that are put on it."""
    base, on = split(given, lambda name: _is_plan(name, model))
    if SHORT_FORM.fullmatch(base):
        return NamedPlan(given, base, put_on=on)
    path = _find_plan(base, model, say)
    document = read_yaml(path)
    plan = None if is_kvtuner(document) or is_modelopt(document) else Plan.load(path)
    return NamedPlan("+".join((path.stem, *on)), str(path), plan, put_on=on)


def _is_plan(name: str, model: str | None) -> bool:
    """Return whether there is a plan of exactly this name, or the name can only be a file."""
    try:
        return state.find_plan(name, model=model) is not None
    except StateError:
        return Path(name).suffix in (".yaml", ".yml")


def _find_plan(name: str, model: str | None, say: Say) -> Path:
    """Return the plan's file. Raises StateError, with advice if it is a preset's name."""
    try:
        return state.find_plan(name, model=model, say=say)
    except StateError as error:
        if name in presets():
            raise StateError(f"{error}; for the preset: --preset {name}") from error
        raise


def _preset(given: str) -> NamedPlan:
    """Return a preset by its name, or KVTuner's by its file, with others that are put on it."""
    base, on = split(given, lambda name: name.startswith(KVTUNER) and Path(name.removeprefix(KVTUNER)).is_file())
    if base.startswith(KVTUNER):
        name = KVTUNER + Path(base.removeprefix(KVTUNER)).stem
    else:
        find_preset(name := base)
    return NamedPlan("+".join((name, *on)), base, is_preset=True, put_on=on)
