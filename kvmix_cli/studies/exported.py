"""The cost of an export: the divergence of a plan here, and of what another engine would make of it, simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import state
from ..errors import EvaluationError, StateError
from ..profile import Profile

if TYPE_CHECKING:
    from ..cache.subject import Subject
    from ..evaluation.base import Settings
    from ..evaluation.results import Estimate, Row
    from ..evaluation.runner import Progress
    from ..evaluation.runs import RunFolders
    from ..export import Export
    from ..models.loading import LoadedModel
    from ..plan import Plan

DEFAULT_TEXT = "builtin"


@dataclass(frozen=True)
class ExportCost:
    """Divergences from the unquantized cache, on one text.

    Attributes:
        text: source of the text, whose held-out side was read.
        tokens: tokens that were scored.
        here: mean KL of the plan through kvmix's cache, in nats a token.
        there: the same through a simulation of the engine's formats.
    """

    text: str
    tokens: int
    here: Estimate
    there: Estimate

    def as_json(self) -> dict[str, Any]:
        """Return the cost as plain data, as `--json` prints it."""
        from dataclasses import asdict

        return {"text": self.text, "tokens": self.tokens, "plan_kl": asdict(self.here), "kl": asdict(self.there)}


def profile_text(plan: Plan) -> str:
    """Return the source of the text that a plan's profile was made from; the built-in one where there is no profile."""
    try:
        profile = Profile.load(state.find_profile(model=plan.model.id))
    except StateError:
        return DEFAULT_TEXT
    score = profile.scores.get(plan.provenance.get("score", ""), next(iter(profile.scores.values())))
    return score.calibration.source


def measure_export(
    engine: str,
    name: str,
    plan: Plan,
    export: Export,
    loaded: LoadedModel,
    settings: Settings,
    folders: RunFolders | None,
    progress: Progress,
) -> ExportCost:
    """Measure a plan and its export on the same text.

    Args:
        engine: name of the engine.
        name: name of the plan.
        folders: where records are kept.

    Raises:
        EvaluationError: if one of them cannot be measured.
        PlanError: if the plan is for another model.
    """
    from ..cache.subject import Subject
    from ..evaluation import get_task
    from ..evaluation.runner import run_task

    plan.check_model(loaded.info)
    subjects = [Subject(name, plan), _simulated(engine, f"{name}-as-{engine}", export)]
    report = run_task(get_task("perplexity"), loaded, subjects, settings, folders, progress)
    here, there = (_divergence(row) for row in report.plans)
    return ExportCost(settings.text, report.tokens, here, there)


def _simulated(engine: str, name: str, export: Export) -> Subject:
    from functools import partial

    from ..cache.baselines.casting import EngineCache
    from ..cache.baselines.named import NamedCache
    from ..cache.in_engine import EngineBaseline
    from ..cache.subject import Subject

    if export.in_blocks:
        return Subject(name, baseline=EngineBaseline(name, export.plan))
    if export.formats is None:
        return Subject(name, export.plan)
    settings: Mapping[str, Any] = {
        "engine": engine,
        "formats": {f"{layer}": f"{k.name} {v.name}" for layer, (k, v) in export.formats.items()},
    }
    make = partial(EngineCache, export.formats)
    cache = NamedCache(name, export.nominal_bits, dict(settings), make, export.stored_bits)
    return Subject(name, baseline=cache)


def _divergence(row: Row) -> Estimate:
    if row.error is not None:
        raise EvaluationError(f"{row.plan} cannot be measured: {row.error}")
    if "kl" not in row.metrics:
        raise EvaluationError(f"{row.plan}: its predictions are not finite; try another --dtype")
    return row.metrics["kl"]
