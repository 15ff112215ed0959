"""kvmix's own plugin of vLLM: a plan as the engine holds it, which `KVMIX_PLAN` names, with what it loses there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import ExportError, PlanError
from ..plan import Plan
from ..plan.engine_blocks import (
    EngineLoss,
    check_blocks,
    left_out,
    losses_in_blocks,
    with_loss,
    without_full_precision,
)
from .target import Export, Target

BLOCK = 16
"""Tokens of the smallest block; an engine checks its own (`--block-size`) when it starts."""


@dataclass(frozen=True)
class PlanTarget(Target):
    """An engine that holds plans themselves: all that blocks can hold, transform codes as well."""

    def export(self, plan: Plan, form: str | None = None) -> Export:
        """Return a plan as the engine holds it. Raises ExportError if it cannot, or a format is named."""
        if form is not None:
            raise ExportError(f"{self.name} holds a plan at its own widths: leave out --format {form}")
        try:
            check_blocks(plan, BLOCK)
        except PlanError as error:
            raise ExportError(f"{self.name} cannot express this plan: {error}") from error
        return self.express(plan, form)


def express(plan: Plan, form: str | None) -> Export:
    """Return the plan without what an engine does not hold, and what that is."""
    held, losses = without_full_precision(plan), losses_in_blocks(plan)
    if (window := left_out(plan)) is not None:
        losses.append(f"the window that the metric of its codes leaves out ({window}) is coded, too")
    return Export(held.to_yaml(), None, held, in_blocks=True, losses=tuple(losses))


def with_measured_loss(export: Export, text: str, tokens: int, kl: float, plan_kl: float) -> Export:
    """Return an export whose plan says what it loses; arguments are those of `EngineLoss`."""
    loss = EngineLoss(plan_sha256=export.plan.sha256, text=text, tokens=tokens, kl=kl, plan_kl=plan_kl)
    plan = with_loss(export.plan, loss)
    return replace(export, plan=plan, text=plan.to_yaml())


TARGET = PlanTarget(
    "vllm-plugin",
    express,
    "this is a plan that our plugin holds in vLLM's CPU engine: `KVMIX_PLAN=FILE vllm serve MODEL`; in kvmix's own "
    "cache it has no window, either",
)
