"""The problem that a method solves: layers to decide, choices, a score, and a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TypeVar

from kvmix_kernels.layout import KINDS, Kind

from ..errors import BudgetError, PlanError
from ..plan import CacheSettings, GroupSize, HeadGeometry, LayerPlan, ModelInfo, TensorPlan
from ..plan.codec import TransformTensor
from ..plan.forms import page_layout
from ..plan.layers import AnyTensor
from ..plan.sizes import format_bytes, layer_bytes
from ..plan.tensors.basis import BasisFile, Variances
from ..profile import Profile, Score, choice_key, parse_choice
from ..state import profile_command
from .budgets import TOLERANCE, Budget
from .correction import loss_ratio
from .curves import Curves
from .levels import Levels

T = TypeVar("T")
Decision = dict[int, LayerPlan]
"""Storage of every layer that a method decides."""
Measure = Callable[[Mapping[int, LayerPlan]], float]
"""Function from all layers of a plan to the plan's measured loss."""


@dataclass(frozen=True)
class Method:
    """A way to decide.

    Attributes:
        uses: the settings of a problem that change the decision, of `score`, `seed`, `group_sizes`, `heads`
            and `evictions`.
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
        basis: directions of the layers, for the method that gives bits to these.
        code_bits: widths that a direction may have besides 0; None for all.
        by_head: decide about every KV head by itself.
        evictions: shares of tokens to evict that every layer chooses from; none for those of the cache's policy.

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
    basis: BasisFile | None = None
    code_bits: tuple[int, ...] | None = None
    by_head: bool = False
    evictions: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.model.quantizable:
            raise BudgetError(f"{self.model.id} has no layer to plan: every layer keeps its stock cache")
        try:
            for layer, pin in self.pins.items():
                for tensor, kind in pin.tensors:
                    self.tensor_cost(layer, kind, tensor)
            for layer in self.layers if self.basis is None else ():  # transform codes fit heads of any size
                for kind in KINDS:
                    self.tensors(layer, kind)
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
        return Curves(self.score, self.model, self.cache, self.variances)

    @cached_property
    def variances(self) -> Variances:
        """Return the variances of all directions, as large as the losses that were measured; none without a basis."""
        if self.basis is None or self.cache.transform is None:
            return {}
        ratio = loss_ratio(self.score, self.cache.transform.exact, self.budget.context)
        return {slot: ratio * each for slot, each in self.basis.variances(self.model.quantizable).items()}

    @cached_property
    def levels(self) -> Levels:
        """Return the levels of the layers to decide, for methods that raise keys and values together."""
        return Levels(self.layers, self.k_bits, self.v_bits, self.tensor_cost)

    def tensors(self, layer: int, kind: Kind) -> list[TensorPlan]:
        """Return every way to store a layer's keys, or values; groups larger than a row are one group per row."""
        return self._tensors(self.model.heads(layer).dim(kind), kind)

    def tensor_cost(self, layer: int, kind: Kind, tensor: AnyTensor) -> int:
        """Return the cost of one layer's keys or values; see `Budget.cost`."""
        return self._tensor_cost(self.model.heads(layer), kind, tensor)

    def cost(self, layers: Mapping[int, LayerPlan]) -> int:
        """Return the cost of all these layers; under a limit of memory with what a layer keeps for exact tokens."""
        budget = self.budget
        if budget.memory is not None and self.basis is not None:
            at = (budget.context, budget.batch, budget.element_bytes)
            heads = self.model.heads
            return sum(layer_bytes(plan, self.cache, heads(layer), *at).total for layer, plan in layers.items())
        return sum(
            self.tensor_cost(layer, kind, tensor) for layer, plan in layers.items() for tensor, kind in plan.tensors
        )

    @property
    def cost_range(self) -> tuple[int, int]:
        """Return the lowest and the highest cost of the layers to decide."""
        costs = [
            [self.tensor_cost(layer, kind, tensor) for tensor in self.tensors(layer, kind)]
            for layer in self.layers
            for kind in KINDS
        ]
        return sum(map(min, costs)), sum(map(max, costs))

    def tensor_loss(self, layer: int, kind: Kind, tensor: AnyTensor) -> float:
        """Return the score's loss of one layer's keys or values. Raises BudgetError if the score lacks this choice."""
        loss = self.curves.at(layer, kind, tensor)
        if loss is None:
            raise self._unmeasured(layer, kind, tensor)
        return loss

    def loss(self, layers: Mapping[int, LayerPlan]) -> float:
        """Return the score's loss of all these layers. Raises BudgetError if the score lacks one of the choices."""
        return sum(
            self.tensor_loss(layer, kind, tensor) for layer, plan in layers.items() for tensor, kind in plan.tensors
        )

    @cached_property
    def allowance(self) -> float:
        """Return the highest cost that the layers to decide may have.

        Without a limit it is that of a share of the layers one level higher, on the average of all layers.
        """
        if self.budget.limit is None:
            return self.levels.mean_cost_after(self.share_moves)
        return self.budget.allowance(self.cache, self.model) - self.pinned_cost

    @property
    def share_moves(self) -> int:
        """Return the number of layers that the budget's share has one level higher, at least one."""
        return min(self.levels.moves, max(1, round(self.budget.share * len(self.layers))))

    @property
    def pinned_cost(self) -> int:
        """Return the cost of the pinned layers."""
        return self.cost(self.pins)

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
                f"{100 * best:.3g} %; {self._advice('--k-bits, --v-bits and --group-size')}"
            )

    def _unmeasured(self, layer: int, kind: Kind, tensor: AnyTensor) -> BudgetError:
        if isinstance(tensor, TransformTensor):
            return BudgetError(f"the loss of transform codes in layer {layer} is not known without their basis")
        layout = page_layout(tensor, kind, self.cache, self.model.heads(layer).dim(kind))
        wanted = choice_key(tensor.bits, layout.group if layout else "row")
        curves = {name: getattr(score.layers[layer], kind[0]).curve for name, score in self.profile.scores.items()}
        others = [name for name, curve in curves.items() if wanted in curve]
        other = f"use --score {' or '.join(others)}, " if others else ""
        return BudgetError(
            f"score '{self.score_name}' was not measured for {kind}s at {wanted}, only at "
            f"{', '.join(curves[self.score_name])}: leave that choice out, {other}or measure it with "
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
        words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
        return profile_command(self.profile.model.id, *words)

    def _unreachable(self, lowest: int, highest: int) -> str:
        budget = self.budget
        if budget.memory is not None:
            return (
                f"no plan fits {format_bytes(budget.memory)} at {budget.context} tokens x {budget.batch}: "
                f"{self._range()} take {format_bytes(lowest)} to {format_bytes(highest)}; lower "
                f"{'' if self.basis else '--k-bits and --v-bits, '}--context or --batch"
            )
        least, most = (budget.bits(cost, self.cache, self.model) for cost in (lowest, highest))
        count, options = "nominal", "--k-bits and --v-bits"
        if budget.counts_stored:
            count, options = "stored", "--k-bits, --v-bits and --group-size"
        return (
            f"no plan has {budget.limit:g} {count} bits: {self._range()} reach {least:.4g} to {most:.4g}; "
            f"{self._advice(options)}"
        )

    @cached_property
    def _tensors(self) -> Callable[[int, Kind], list[TensorPlan]]:
        """Return the ways to store heads of a size, worked out once for each size."""

        def tensors(dim: int, kind: Kind) -> list[TensorPlan]:
            found: dict[tuple[int, int | None], TensorPlan] = {}
            for size in self.group_sizes:
                for bits in self.k_bits if kind == "key" else self.v_bits:
                    tensor = TensorPlan(bits=bits, group_size=None if size == self.cache.group_size else size)
                    layout = page_layout(tensor, kind, self.cache, dim)
                    found.setdefault((bits, layout.group if layout else None), tensor)
            return list(found.values())

        return cache(tensors)

    @cached_property
    def _tensor_cost(self) -> Callable[[HeadGeometry, Kind, AnyTensor], int]:
        return cache(lambda heads, kind, tensor: self.budget.cost(tensor, kind, self.cache, heads))

    def _range(self) -> str:
        """Return `K widths 2,3 and V widths 2,4 in groups of 32,64 beside 2 pinned layers`."""
        text = f"K widths {_listed(self.k_bits)} and V widths {_listed(self.v_bits)}"
        if self.basis is not None:
            text = "transform codes"
        if len(self.group_sizes) > 1:
            text += f" in groups of {_listed(self.group_sizes)}"
        if self.pins:
            text += f" beside {len(self.pins)} pinned layer{'s' if len(self.pins) > 1 else ''}"
        return text

    def _advice(self, options: str) -> str:
        """Return how to widen the range: with these options, which transform codes do not have."""
        if self.basis is not None:
            return "the widths of transform codes are 0 to 6; use --method ilp for others"
        return f"widen the range with {options}"


def _listed(values: Sequence[object]) -> str:
    return ",".join(map(str, values))
