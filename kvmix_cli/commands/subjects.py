"""Which model and which plans the options of `run` and `eval` mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import console, state
from ..errors import EvaluationError
from ..files import read_yaml
from ..plan import CacheSettings, ModelInfo, Plan, is_kvtuner

SHORT_FORM = re.compile(r".*:k\d+v\d+\s*")
RESERVED = "unquantized"


@dataclass(frozen=True)
class Named:
    """One `--plan`: a kvmix plan, or something that becomes one once the model is known.

    Attributes:
        plan: None for the short form and for KVTuner's presets.
    """

    name: str
    given: str
    plan: Plan | None = None

    def resolve(self, info: ModelInfo, cache: CacheSettings | None) -> Plan:
        """The plan for a model. Raises PlanError, or DocumentError for a faulty preset."""
        if self.plan is not None:
            self.plan.check_model(info)
            return self.plan
        if SHORT_FORM.fullmatch(self.given):
            return Plan.from_short(self.given, info, cache)
        return Plan.from_kvtuner(Path(self.given), info, cache)


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
        cache = self.source.plan.cache if self.source and self.source.plan else None
        if uniform or any(each.plan is None for each in self.named):
            console.notice(f"page, group and window: {f'as in plan {self.source.name}' if self.source else 'defaults'}")
        found = [(each.name, each.resolve(info, cache)) for each in self.named]
        found += [(f"uniform-{bits}", Plan.uniform(info, bits, bits, cache)) for bits in uniform]
        plans: dict[str, Plan] = {}
        for name, plan in found:
            if name in plans or name == RESERVED:
                raise EvaluationError(f"two rows would be called '{name}'; rename a plan file or leave one out")
            plans[name] = plan
        return plans


def choose(given: Sequence[str], *, model: str | None, revision: str | None, need_plan: bool) -> Choice:
    """Find the plans that are given, or else the newest one, and the model they are for.

    Args:
        given: files, names and short forms.
        need_plan: take the newest plan if none is given. If not (`--uniform`, `--baseline`), the newest one is only
            asked for its model, when that is not named, and for its cache settings.

    Raises:
        StateError: if a plan or the model cannot be told.
        DocumentError: if a plan file is faulty.
    """
    named = tuple(_named(each, model) for each in given)
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
    if SHORT_FORM.fullmatch(given):
        return Named(given, given)
    path = state.find_plan(given, model=model)
    if is_kvtuner(read_yaml(path)):
        return Named(path.stem, str(path))
    return Named(path.stem, str(path), Plan.load(path))
