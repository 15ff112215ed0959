"""Why a plan's layers get what they get: reasons from the profile beside the plan, as a table and for `--json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import console, state
from ..errors import BudgetError, KvmixError, StateError
from ..plan import Plan, TensorPlan
from ..profile import Profile
from ..reporting.tables import loss_text, notice_settings, summary, tensor_text

if TYPE_CHECKING:
    from ..allocation.explain import Reason
    from ..reporting.plots import Frontier


@dataclass(frozen=True)
class Explanation:
    """A plan's reasons, keys and values of each layer in turn.

    Attributes:
        importance: the score that the plan was made with.
        prediction: the score that predicts what it costs; None if the profile has none.
    """

    path: Path
    profile: Profile
    importance: str
    prediction: str | None
    reasons: list[Reason]

    @property
    def layers(self) -> list[tuple[Reason, Reason]]:
        """Keys and values of each layer."""
        return list(zip(self.reasons[::2], self.reasons[1::2], strict=True))

    @property
    def loss(self) -> float | None:
        """Predicted loss of the whole plan, in nats a token; None if it is not known of every choice."""
        losses = [reason.loss for reason in self.reasons if reason.loss is not None]
        return sum(losses) if len(losses) == len(self.reasons) else None

    def frontier(self, plan: Plan) -> Frontier | None:
        """The plan among the best there are at its group sizes; None without a prediction of its loss."""
        from ..allocation import frontier, predicted_loss
        from ..reporting.plots import Frontier

        if self.prediction is None or self.loss is None:
            return None
        own = dict.fromkeys(tensor.group_size for layer in plan.layers.values() for tensor, _ in layer.tensors)
        sizes = [plan.cache.group_size, *(size for size in own if size is not None)]
        try:
            family = frontier(self.profile, score=self.prediction, cache=plan.cache, group_sizes=sizes)
        except BudgetError as error:
            console.notice(f"no frontier: {error}")
            return None
        score = self.profile.score(self.prediction)
        best = [(each.bits.stored, loss) for each in family if (loss := predicted_loss(each, score)) is not None]
        return Frontier(self.prediction, best, (plan.bits.stored, self.loss))


def explanation(plan: Plan, file: Path, given: Path | None) -> Explanation | None:
    """Reasons from the profile given, or else from the one beside the plan's file or of its model, if it fits.

    Raises:
        StateError, DocumentError, PlanError: if the profile given is missing, faulty, or of another model.
    """
    from ..allocation.explain import explain

    try:
        path = state.find_profile(given or _beside(file), model=plan.model.id)
        profile = Profile.load(path)
        plan.check_model(profile.model)
    except KvmixError as error:
        if given is not None:
            raise
        if not isinstance(error, StateError):
            console.notice(f"not explained: {error}")
        return None
    if plan.provenance.get("profile_sha256", profile.sha256) != profile.sha256:
        console.notice(f"{path} is not the profile that the plan was made from; the reasons are this one's")
    importance, prediction = _scores(plan, profile)
    if prediction is not None:
        notice_settings(prediction, profile.score(prediction), plan.cache)
    reasons = explain(plan, profile.score(importance), profile.score(prediction) if prediction else None)
    return Explanation(path, profile, importance, prediction, reasons)


def _beside(plan: Path) -> Path | None:
    """The profile in whose folder of plans this one is, if any."""
    profile = plan.parent.parent / state.PROFILE
    return profile if plan.parent.name == state.PLANS and profile.is_file() else None


def _scores(plan: Plan, profile: Profile) -> tuple[str, str | None]:
    """The score that decided, and one that predicts loss: the same one if it does."""
    from ..allocation import default_score

    decided = str(plan.provenance.get("score"))
    importance = decided if decided in profile.scores else default_score(profile, "rank")
    ordered = (importance, default_score(profile, "ilp"), *profile.scores)
    return importance, next((name for name in ordered if profile.score(name).predicts_loss), None)


def show_explained(plan: Plan, found: Explanation, path: Path, context: int, batch: int) -> None:
    """A table of every layer's widths with their reasons, and what they amount to."""
    method = plan.provenance.get("method", "unknown method")
    columns = ["bits", "score"] if found.prediction is None else ["bits", "score", "loss", "next"]
    rows = [[keys.layer, *_cells(keys, found), *_cells(values, found)] for keys, values in found.layers]
    console.table(
        f"plan for {plan.model.id} by {method}",
        ["layer", *(f"{kind} {column}" for kind in "KV" for column in columns)],
        rows,
        footer="\n".join([*_footer(plan, found), summary(plan, path, context, batch)]),
    )


def _cells(reason: Reason, found: Explanation) -> list[str]:
    cells = [tensor_text(reason.tensor), f"{reason.importance:.3g}"]
    return cells if found.prediction is None else [*cells, _loss(reason.loss), _next(reason)]


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.2g}"


def _next(reason: Reason) -> str:
    """`4: -0.0012 for +0.0625`."""
    upgrade = reason.upgrade
    return "" if upgrade is None else f"{tensor_text(upgrade.tensor)}: -{upgrade.saves:.2g} for +{upgrade.costs:.3g}"


def _footer(plan: Plan, found: Explanation) -> list[str]:
    from ..allocation.explain import next_upgrade

    lines = [f"score:   {found.importance}, from {found.path}"]
    if found.loss is not None:
        lines.append(loss_text(found.loss, str(found.prediction)))
    first = next_upgrade(found.reasons)
    if first is not None and first.upgrade is not None:
        what = f"{tensor_text(first.upgrade.tensor)} bits for the {first.kind}s of layer {first.layer}"
        stored = plan.bits.stored + first.upgrade.costs
        lines.append(f"next:    nats saved for stored bits added; first of all {what}, {stored:.4g} stored bits then")
    return lines


def explanation_json(found: Explanation) -> dict[str, Any]:
    """Scores, predicted losses and upgrades as plain data."""
    from ..allocation.explain import next_upgrade

    first = next_upgrade(found.reasons)
    return {
        "profile": found.path,
        "score": found.importance,
        "predicted_by": found.prediction,
        "predicted_loss": found.loss,
        "next": first and {"index": first.layer, "tensor": first.kind[0], **_reason_json(first)},
        "layers": [{"index": k.layer, "k": _reason_json(k), "v": _reason_json(v)} for k, v in found.layers],
    }


def _reason_json(reason: Reason) -> dict[str, Any]:
    upgrade = reason.upgrade
    wider = upgrade and {**_tensor_json(upgrade.tensor), "saves": upgrade.saves, "costs": upgrade.costs}
    return {**_tensor_json(reason.tensor), "score": reason.importance, "loss": reason.loss, "next": wider}


def _tensor_json(tensor: TensorPlan) -> dict[str, Any]:
    return tensor.model_dump(exclude_none=True)
