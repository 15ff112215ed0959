"""Explanations: the reasons for a plan's widths, from the scores of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..allocation import default_score, frontier, other_settings, predicted_loss
from ..allocation.explain import Reason, explain
from ..errors import PlanError
from ..plan import CacheSettings, Plan
from ..plan.windows import NoWindow
from ..profile import Profile, Score

Point = tuple[float, float]
"""Stored bits, and predicted loss in nats per token."""


@dataclass(frozen=True)
class Frontier:
    """The best plans along the whole range of stored bits, and one plan beside them.

    Attributes:
        score: score that predicts the losses.
        best: points of the best plans, ascending in bits.
        plan: point of the one plan.
    """

    score: str
    best: Sequence[Point]
    plan: Point


@dataclass(frozen=True)
class Explanation:
    """Reasons for a plan's widths, keys and values of each layer in turn.

    Attributes:
        plan: the plan.
        path: file of the profile.
        profile: profile that the reasons are from.
        importance: score that the plan was made with.
        prediction: score that predicts the loss; None if the profile has none.
        reasons: keys and values of each layer in turn.
        notices: sentences for the user, about a profile or settings other than the plan's.
    """

    plan: Plan
    path: Path
    profile: Profile
    importance: str
    prediction: str | None
    reasons: list[Reason]
    notices: tuple[str, ...]

    @property
    def layers(self) -> list[tuple[Reason, Reason]]:
        """Return the reasons for keys and values of each layer."""
        return list(zip(self.reasons[::2], self.reasons[1::2], strict=True))

    @property
    def loss(self) -> float | None:
        """Return the predicted loss of the whole plan, in nats per token; None unless every choice has one."""
        losses = [reason.loss for reason in self.reasons if reason.loss is not None]
        return sum(losses) if len(losses) == len(self.reasons) else None

    def frontier(self) -> Frontier | None:
        """Return the best plans with the plan's group sizes beside it; None without a prediction of its loss.

        Raises:
            BudgetError: if the score was not measured for one of the choices.
        """
        if self.prediction is None or self.loss is None:
            return None
        plan = self.plan
        own = dict.fromkeys(tensor.group_size for layer in plan.layers.values() for tensor, _ in layer.affine)
        sizes = [plan.cache.group_size, *(size for size in own if size is not None)]
        family = frontier(self.profile, score=self.prediction, cache=plan.cache, group_sizes=sizes)
        score = self.profile.score(self.prediction)
        best = [(each.bits.stored, loss) for each in family if (loss := predicted_loss(each, score)) is not None]
        return Frontier(self.prediction, best, (plan.bits.stored, self.loss))


def explain_plan(plan: Plan, profile: Profile, path: Path) -> Explanation:
    """Explain a plan by the scores of a profile of its model.

    Args:
        plan: the plan.
        profile: profile of the plan's model, read from `path`.
        path: file of the profile, for notices and output.

    Raises:
        PlanError: if the plan was made for another model, or has transform codes.
    """
    plan.check_model(profile.model)
    if any(layer.is_coded for layer in plan.layers.values()):
        raise PlanError("transform codes are decided by direction, not by the importance of layers")
    notices = []
    if plan.provenance.get("profile_sha256", profile.sha256) != profile.sha256:
        notices.append(f"{path} is not the profile that the plan was made from; the reasons are this one's")
    importance, prediction = _scores(plan, profile)
    predicting = None if prediction is None else profile.score(prediction)
    if prediction is not None and predicting is not None:
        notices += settings_notices(prediction, predicting, plan.cache)
    reasons = explain(plan, profile.score(importance), predicting)
    return Explanation(plan, path, profile, importance, prediction, reasons, tuple(notices))


def settings_notices(name: str, score: Score, cache: CacheSettings) -> list[str]:
    """Return a sentence about the settings that a score was measured with, if they differ from a plan's."""
    notices = []
    if differences := other_settings(score, cache):
        notices.append(f"{name} was measured with other settings than the plan's: {', '.join(differences)}")
    if score.moments is not None and isinstance(cache.window, NoWindow) and not score.is_for_engines:
        notices.append(
            f"{name} leaves out the tokens just before a query, whose codes matter most without a window: measure all "
            f"with --score {name} --window none, into a file of its own with --out"
        )
    return notices


def _scores(plan: Plan, profile: Profile) -> tuple[str, str | None]:
    """Return the score that decided, and one that predicts loss: the same one if it does."""
    decided = str(plan.provenance.get("score"))
    importance = decided if decided in profile.scores else default_score(profile, "rank")
    ordered = (importance, default_score(profile, "ilp"), *profile.scores)
    return importance, next((name for name in ordered if profile.score(name).predicts_loss), None)
