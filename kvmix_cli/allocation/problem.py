"""The problem that a method solves: layers to decide, choices, a score, and a budget."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, TypeVar

from kvmix_kernels.layout import Kind

from ..errors import BudgetError, PlanError
from ..plan import CacheSettings, GroupSize, LayerPlan, ModelInfo, TensorPlan
from ..plan.sizes import format_bytes, page_layout
from ..profile import Profile, Score, choice_key, parse_choice
from .budgets import TOLERANCE, Budget
from .curves import Curves
from .levels import Levels

T = TypeVar("T")
KINDS: Final[tuple[Kind, ...]] = ("key", "value")
Decision = dict[int, LayerPlan]
"""Storage of every layer that a method decides."""
Measure = Callable[[Mapping[int, LayerPlan]], float]
"""Function from all layers of a plan to the plan's measured loss."""


@dataclass(frozen=True)
class Method:
    """A way to decide.

    Attributes:
        uses: the settings of a problem that change the decision, of `score`, `seed` and `group_sizes`.
        solve: function that decides one plan; None for a method that makes several plans or measures them.
    """

    uses: tuple[str, ...] = ()
    solve: Callable[[Problem], Decision] | None = None


@dataclass(frozen=True)
class Problem:
    """Everything that a method may use.

    Args:
        profile: scores of the model.
        score_name: name of the score that decides.
        budget: limit that the plan must keep to.
        cache: settings of the plan; its group size is used by methods that do not choose one.
        k_bits, v_bits: widths to choose from, ascending.
        group_sizes: group sizes to choose from, the cache's own first.
        pins: layers that are decided already. Their cost is part of the plan's.
        seed: seed of methods that draw at random.

    Raises:
        BudgetError: if the model has no layer to plan.
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
                self.tensors(kind)
        except ValueError as error:
            raise PlanError(f"no plan for {self.model.id}: {error}") from error

    @property
    def model(self) -> ModelInfo:
        """Return the profile's model."""
        return self.profile.model

    @cached_property
    def profile_sha256(self) -> str:
        """Return the checksum of the profile; that of a large one takes a while."""
        return self.profile.sha256

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Return the layers to decide, ascending: all that can be quantized and are not pinned."""
        return tuple(layer for layer in self.model.quantizable if layer not in self.pins)

    @cached_property
    def score(self) -> Score:
        """Return the score that decides."""
        return self.profile.score(self.score_name)

    @cached_property
    def curves(self) -> Curves:
        """Return the score's loss of each choice."""
        return Curves(self.score, self.model, self.cache)

    @cached_property
    def levels(self) -> Levels:
        """Return the levels of the layers to decide, for methods that raise keys and values together."""
        return Levels(self.layers, self.k_bits, self.v_bits, self.cost)

    def tensors(self, kind: Kind) -> list[TensorPlan]:
        """Return every way to store a layer's keys, or values; groups larger than a row are one group per row."""
        found: dict[tuple[int, int | None], TensorPlan] = {}
        for size in self.group_sizes:
            for bits in self.k_bits if kind == "key" else self.v_bits:
                tensor = TensorPlan(bits=bits, group_size=None if size == self.cache.group_size else size)
                layout = page_layout(tensor, kind, self.cache, self.model.head_dim)
                found.setdefault((bits, layout.group if layout else None), tensor)
        return list(found.values())

    def tensor_cost(self, tensor: TensorPlan, kind: Kind) -> int:
        """Return the cost of one layer's keys or values; see `Budget.cost`."""
        return self.budget.cost(tensor, kind, self.cache, self.model)

    def cost(self, layer: LayerPlan) -> int:
        """Return the cost of one layer."""
        return sum(self.tensor_cost(tensor, kind) for tensor, kind in layer.tensors)

    @property
    def cost_range(self) -> tuple[int, int]:
        """Return the lowest and the highest cost of the layers to decide."""
        costs = [[self.tensor_cost(tensor, kind) for tensor in self.tensors(kind)] for kind in KINDS]
        return len(self.layers) * sum(map(min, costs)), len(self.layers) * sum(map(max, costs))

    def tensor_loss(self, layer: int, kind: Kind, tensor: TensorPlan) -> float:
        """Return the score's loss of one layer's keys or values. Raises BudgetError if the score lacks this choice."""
        loss = self.curves.at(layer, kind, tensor)
        if loss is None:
            raise self._unmeasured(kind, tensor)
        return loss

    def loss(self, layers: Mapping[int, LayerPlan]) -> float:
        """Return the score's loss of all these layers. Raises BudgetError if the score lacks one of the choices."""
        return sum(
            self.tensor_loss(layer, kind, tensor) for layer, plan in layers.items() for tensor, kind in plan.tensors
        )

    @cached_property
    def allowance(self) -> float:
        """Return the highest cost that the layers to decide may have; without a limit, the cost of higher layers."""
        if self.budget.limit is None:
            higher = max(1, round(self.budget.share * len(self.layers)))
            return self.levels.cost_after(min(self.levels.moves, higher))
        whole = self.budget.allowance(len(self.model.quantizable), self.cache, self.model)
        return whole - self.pinned_cost

    @property
    def pinned_cost(self) -> int:
        """Return the cost of the pinned layers."""
        return sum(self.cost(layer) for layer in self.pins.values())

    @cached_property
    def loss_limit(self) -> float | None:
        """Return the predicted loss that the layers to decide may have, in nats; None for a budget of bits or bytes."""
        return None if self.budget.loss is None else self.budget.loss - self.loss(self.pins)

    def within(self, candidates: Iterable[T], *, cost: Callable[[T], int], loss: Callable[[T], float]) -> list[T]:
        """Return the candidates for all layers that meet the budget. Raises BudgetError, with the reachable range."""
        if self.loss_limit is not None:
            losses = [(loss(each), each) for each in candidates]
            self.check_loss(min(lost for lost, _ in losses))
            return [each for lost, each in losses if lost <= self.loss_limit]
        costs = [(cost(each), each) for each in candidates]
        self.check_cost(min(spent for spent, _ in costs), max(spent for spent, _ in costs))
        return [each for spent, each in costs if spent <= self.allowance]

    def check_cost(self, lowest: int, highest: int) -> None:
        """Raise BudgetError if the budget is below the lowest cost, or a budget of bits above the highest."""
        pinned = self.pinned_cost
        slack = 2 * TOLERANCE * (highest + pinned)
        beyond = self.budget.memory is None and self.allowance > highest + slack
        if not lowest <= self.allowance or beyond:
            raise BudgetError(self._unreachable(lowest + pinned, highest + pinned))

    def check_loss(self, lowest: float) -> None:
        """Raise BudgetError if even the lowest loss of the layers to decide is above the limit."""
        if self.loss_limit is not None and lowest > self.loss_limit:
            asked, best = self.budget.max_loss or 0, math.expm1(lowest + self.loss(self.pins))
            raise BudgetError(
                f"no plan keeps the predicted perplexity increase within {100 * asked:g} %: {self._range()} reach "
                f"{100 * best:.3g} %; widen the range with --k-bits, --v-bits and --group-size"
            )

    def _unmeasured(self, kind: Kind, tensor: TensorPlan) -> BudgetError:
        layout = page_layout(tensor, kind, self.cache, self.model.head_dim)
        wanted = choice_key(tensor.bits, layout.group if layout else "row")
        place = 0 if kind == "key" else 1
        others = [name for name, score in self.profile.scores.items() if wanted in score.choices[place]]
        other = f"use --score {' or '.join(others)}, " if others else ""
        return BudgetError(
            f"score '{self.score_name}' was not measured for {kind}s at {wanted}, only at "
            f"{', '.join(self.score.choices[place])}: leave that choice out, {other}or measure it with "
            f"`{self._measuring(wanted)}`"
        )

    def _measuring(self, wanted: str) -> str:
        """Return the command that measures the score on the same text with one more choice."""
        choices = [parse_choice(key) for key in (*self.score.choices[0], *self.score.choices[1], wanted)]
        text = self.score.calibration
        options = {
            "score": self.score_name,
            "bits": ",".join(map(str, sorted({bits for bits, _ in choices}))),
            "group-size": ",".join(sorted({str(group) for _, group in choices}, key=lambda size: (len(size), size))),
            "encode": self.score.setup.get("encode"),
            "calibration": text.source,
            "samples": text.samples,
            "seq-len": text.seq_len,
            "seed": text.seed,
        }
        words = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
        return " ".join(["kvmix profile", shlex.quote(self.profile.model.id), *words])

    def _unreachable(self, lowest: int, highest: int) -> str:
        budget, layers = self.budget, len(self.model.quantizable)
        if budget.memory is not None:
            return (
                f"no plan fits {format_bytes(budget.memory)} at {budget.context} tokens x {budget.batch}: "
                f"{self._range()} take {format_bytes(lowest)} to {format_bytes(highest)}; lower --k-bits and --v-bits, "
                "--context or --batch"
            )
        least, most = (budget.bits(cost, layers, self.cache, self.model) for cost in (lowest, highest))
        count, options = "nominal", "--k-bits and --v-bits"
        if budget.counts_stored:
            count, options = "stored", "--k-bits, --v-bits and --group-size"
        return (
            f"no plan has {budget.limit:g} {count} bits: {self._range()} reach {least:.4g} to {most:.4g}; "
            f"widen the range with {options}"
        )

    def _range(self) -> str:
        """Return `K widths 2,3 and V widths 2,4 in groups of 32,64 beside 2 pinned layers`."""
        text = f"K widths {_listed(self.k_bits)} and V widths {_listed(self.v_bits)}"
        if len(self.group_sizes) > 1:
            text += f" in groups of {_listed(self.group_sizes)}"
        if self.pins:
            text += f" beside {len(self.pins)} pinned layer{'s' if len(self.pins) > 1 else ''}"
        return text


def _listed(values: Sequence[object]) -> str:
    return ",".join(map(str, values))
