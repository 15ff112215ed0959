"""What a method is asked to decide, and what its decision would cost. Pure: no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, TypeVar

from kvmix_kernels.layout import Kind

from ..errors import BudgetError, PlanError
from ..plan import CacheSettings, GroupSize, LayerPlan, ModelInfo, TensorPlan
from ..plan.sizes import page_layout
from ..profile import Profile, Score
from . import reach
from .budgets import PAPER_SHARE, Budget
from .curves import Curves
from .ladder import Ladder

T = TypeVar("T")
KINDS: Final[tuple[Kind, ...]] = ("key", "value")
Decision = dict[int, LayerPlan]
"""How every layer that is to be decided is stored."""
Measure = Callable[[Mapping[int, LayerPlan]], float]
"""From all layers of a plan to its measured loss."""


@dataclass(frozen=True)
class Problem:
    """Everything a method may look at.

    Args:
        score_name: of the profile's scores.
        cache: settings of the plan; its group size is the one that methods without a choice use.
        k_bits, v_bits: ladders of widths to choose from, ascending.
        group_sizes: to choose from, by methods that do; the cache's own first.
        pins: layers that are decided already. Their cost is taken off the budget.
        seed: of methods that draw at random.

    Raises:
        BudgetError: if there is no layer to plan.
        PlanError: if the model's heads cannot be packed.
    """

    profile: Profile
    score_name: str
    budget: Budget
    cache: CacheSettings
    k_bits: tuple[int, ...]
    v_bits: tuple[int, ...]
    group_sizes: tuple[GroupSize, ...]
    pins: Mapping[int, LayerPlan] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.model.quantizable:
            raise BudgetError(f"{self.model.id} has no layer to plan: every layer keeps its stock cache")
        try:
            for kind in KINDS:
                self.choices(kind)
        except ValueError as error:
            raise PlanError(f"no plan for {self.model.id}: {error}") from error

    @property
    def model(self) -> ModelInfo:
        """The profile's model."""
        return self.profile.model

    @cached_property
    def profile_sha256(self) -> str:
        """Of the profile's content; large profiles take a while."""
        return self.profile.sha256

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers to decide, ascending: all that can be quantized and are not pinned."""
        return tuple(layer for layer in self.model.quantizable if layer not in self.pins)

    @cached_property
    def score(self) -> Score:
        """What the decision goes by."""
        return self.profile.score(self.score_name)

    @cached_property
    def curves(self) -> Curves:
        """What each choice costs in the score's unit."""
        return Curves(self.score, self.model, self.cache)

    @cached_property
    def ladder(self) -> Ladder:
        """The levels that layers climb when keys and values rise together."""
        return Ladder(self)

    def choices(self, kind: Kind) -> list[TensorPlan]:
        """Every way to store a layer's keys, or values, each once: groups larger than a row are one group a row."""
        found: dict[tuple[int, int | None], TensorPlan] = {}
        for size in self.group_sizes:
            for bits in self.k_bits if kind == "key" else self.v_bits:
                tensor = TensorPlan(bits=bits, group_size=None if size == self.cache.group_size else size)
                layout = page_layout(tensor, kind, self.cache, self.model.head_dim)
                found.setdefault((bits, layout.group if layout else None), tensor)
        return list(found.values())

    def tensor_cost(self, tensor: TensorPlan, kind: Kind) -> int:
        """What one layer's keys or values cost, in whole numbers (`budgets.py`)."""
        return self.budget.cost(tensor, kind, self.cache, self.model)

    def cost(self, layer: LayerPlan) -> int:
        """What one layer costs."""
        return sum(self.tensor_cost(tensor, kind) for tensor, kind in layer.tensors)

    @property
    def cost_range(self) -> tuple[int, int]:
        """What the layers to decide cost at least and at most."""
        costs = [[self.tensor_cost(tensor, kind) for tensor in self.choices(kind)] for kind in KINDS]
        return len(self.layers) * sum(map(min, costs)), len(self.layers) * sum(map(max, costs))

    def tensor_loss(self, layer: int, kind: Kind, tensor: TensorPlan) -> float:
        """What the score says of one layer's keys or values. Raises BudgetError if it has no value for that."""
        loss = self.curves.at(layer, kind, tensor)
        if loss is None:
            raise reach.unmeasured(self, kind, tensor)
        return loss

    def loss(self, layers: Mapping[int, LayerPlan]) -> float:
        """What the score says of all these layers. Raises BudgetError if it has no value for one of the choices."""
        return sum(
            self.tensor_loss(layer, kind, tensor) for layer, plan in layers.items() for tensor, kind in plan.tensors
        )

    @cached_property
    def allowance(self) -> float:
        """What the layers to decide may cost; under the paper's rule, what its share of higher layers costs."""
        if self.budget.limit is None:
            return self.ladder.cost_after(min(self.ladder.steps, max(1, round(PAPER_SHARE * len(self.layers)))))
        whole = self.budget.allowance(len(self.model.quantizable), self.cache, self.model)
        return whole - self.pinned_cost

    @property
    def pinned_cost(self) -> int:
        """What the pinned layers cost."""
        return sum(self.cost(layer) for layer in self.pins.values())

    @cached_property
    def loss_limit(self) -> float | None:
        """The predicted loss that the layers to decide may have, in nats; None if the budget is in bits or bytes."""
        return None if self.budget.loss is None else self.budget.loss - self.loss(self.pins)

    def within(self, candidates: Iterable[T], *, cost: Callable[[T], int], loss: Callable[[T], float]) -> list[T]:
        """Those candidates for all layers that meet the budget. Raises BudgetError, with the reachable range."""
        if self.loss_limit is not None:
            losses = [(loss(each), each) for each in candidates]
            reach.check_loss(self, min(lost for lost, _ in losses))
            return [each for lost, each in losses if lost <= self.loss_limit]
        costs = [(cost(each), each) for each in candidates]
        reach.check_cost(self, min(spent for spent, _ in costs), max(spent for spent, _ in costs))
        return [each for spent, each in costs if spent <= self.allowance]
