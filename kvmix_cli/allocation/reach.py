"""Budgets that cannot be met, and what to say about them: always with the range that can be reached."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvmix_kernels.layout import Kind

from ..errors import BudgetError
from ..plan import TensorPlan
from ..plan.sizes import format_bytes, page_layout
from ..profile import choice_key
from .budgets import TOLERANCE

if TYPE_CHECKING:
    from .problem import Problem


def check_cost(problem: Problem, lowest: int, highest: int) -> None:
    """Raise BudgetError if the layers to decide cost more than the budget at least, or less bits than it at most."""
    pinned = problem.pinned_cost
    slack = 2 * TOLERANCE * (highest + pinned)
    beyond = problem.budget.memory is None and problem.allowance > highest + slack
    if not lowest <= problem.allowance or beyond:
        raise BudgetError(_out_of_range(problem, lowest + pinned, highest + pinned))


def check_loss(problem: Problem, lowest: float) -> None:
    """Raise BudgetError if even the best choice for all layers is predicted to lose more than the budget allows."""
    limit = problem.loss_limit
    if limit is not None and lowest > limit:
        asked, best = problem.budget.max_loss, math.expm1(lowest + problem.loss(problem.pins))
        raise BudgetError(
            f"no plan keeps the predicted perplexity increase within {100 * (asked or 0):g} %: "
            f"{_choices(problem)} reach {100 * best:.3g} %; widen the range with --k-bits, --v-bits and --group-size"
        )


def unmeasured(problem: Problem, kind: Kind, tensor: TensorPlan) -> BudgetError:
    """The error for a choice that the score has no value for."""
    layout = page_layout(tensor, kind, problem.cache, problem.model.head_dim)
    wanted = choice_key(tensor.bits, layout.group if layout else "row")
    known = ", ".join(problem.score.choices[kind == "value"])
    return BudgetError(
        f"score '{problem.score_name}' was not measured for {kind}s at {wanted}, only at {known}: "
        "leave that choice out, name another --score, or measure it with `kvmix profile --bits ... --group-size ...`"
    )


def _out_of_range(problem: Problem, lowest: int, highest: int) -> str:
    budget, choices = problem.budget, _choices(problem)
    if budget.memory is not None:
        asked = f"{format_bytes(budget.memory)} at {budget.context} tokens x {budget.batch}"
        reach = f"take {format_bytes(lowest)} to {format_bytes(highest)}"
        return f"no plan fits {asked}: {choices} {reach}; lower --k-bits and --v-bits, --context or --batch"
    least, most = (
        budget.bits(cost, len(problem.model.quantizable), problem.cache, problem.model) for cost in (lowest, highest)
    )
    asked, options = f"{budget.limit:g} nominal", "--k-bits and --v-bits"
    if budget.counts_stored:
        asked, options = f"{budget.limit:g} stored", "--k-bits, --v-bits and --group-size"
    return f"no plan has {asked} bits: {choices} reach {least:.4g} to {most:.4g}; widen the range with {options}"


def _choices(problem: Problem) -> str:
    """`K widths 2,3 and V widths 2,4 in groups of 32,64 beside 2 pinned layers`; the last two only if there are any."""
    text = f"K widths {_list(problem.k_bits)} and V widths {_list(problem.v_bits)}"
    if len(problem.group_sizes) > 1:
        text += f" in groups of {_list(problem.group_sizes)}"
    if problem.pins:
        text += f" beside {len(problem.pins)} pinned layer{'s' if len(problem.pins) > 1 else ''}"
    return text


def _list(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values))
