"""Budgets: the one limit that a plan has to keep to, and the cost of layers under it.

    avg_bits       mean nominal bits of keys and values       cost: bits of a token's codes
    stored_bits    the same with scales and zeros             cost: bytes of a packed page in all KV heads
    memory         bytes at a context and batch               cost: bytes, with sinks, window and the open page
    max_loss       predicted increase of the perplexity       cost: as of stored_bits, as little as possible
    share          share of the layers one level higher       cost: bits of a token's codes

Costs are whole numbers, so that sums are exact and a plan that costs exactly the limit is within it. A layer that
holds more elements a token costs more, and counts for more in a mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvmix_kernels.layout import Kind

from ..errors import BudgetError
from ..plan import CacheSettings, HeadGeometry, ModelInfo
from ..plan.codec import TransformTensor
from ..plan.layers import AnyTensor
from ..plan.sizes import page_bytes, tensor_bytes, transform_layout

PAPER_SHARE = 0.2
"""Share of the layers that KVmix keeps one level higher. In its own table 30 % add only 0.09 points on GSM8K."""
TOLERANCE = 1e-9
"""Bits per element by which a plan may exceed a limit, so that the rounding of a mean does not matter."""


@dataclass(frozen=True)
class Budget:
    """One limit; without one, a share of the layers that is one level higher (the paper's rule).

    Args:
        avg_bits: mean nominal bits of keys and values.
        stored_bits: mean stored bits, with scales and zeros.
        memory: bytes of the planned layers at `context` tokens and `batch` sequences.
        max_loss: fraction of the perplexity that the plan is predicted to add at most, 0.005 for 0.5 %.
        context, batch: tokens and sequences at which `memory` is counted. Losses of transform codes are predicted for
            so many tokens, too.
        element_bytes: size of an element that stays unquantized, for `memory`.
        share: share of the layers one level higher, without another limit.

    Raises:
        BudgetError: for more than one limit, a size below 1, or a fraction that is not at least 0 and finite.
    """

    avg_bits: float | None = None
    stored_bits: float | None = None
    memory: float | None = None
    max_loss: float | None = None
    context: int = 32768
    batch: int = 1
    element_bytes: int = 2
    share: float = PAPER_SHARE

    def __post_init__(self) -> None:
        if len(self._limits) > 1:
            raise BudgetError(f"a budget has one limit, not several ({', '.join(self._limits)})")
        if min(self.context, self.batch, self.element_bytes) < 1:
            raise BudgetError(f"context and batch must be at least 1, got {self.context} and {self.batch}")
        if self.max_loss is not None and not 0 <= self.max_loss < math.inf:
            raise BudgetError(f"max_loss is a share of the perplexity such as 0.005, got {self.max_loss}")
        if not 0 <= self.share <= 1:
            raise BudgetError(f"share is a share of the layers such as 0.2, got {self.share}")

    @property
    def _limits(self) -> dict[str, float]:
        names = ("avg_bits", "stored_bits", "memory", "max_loss")
        return {name: limit for name in names if (limit := getattr(self, name)) is not None}

    @property
    def limit(self) -> float | None:
        """Return the limit in bits per element, bytes, or a share of the perplexity; None for a share of layers."""
        return next(iter(self._limits.values()), None)

    @property
    def loss(self) -> float | None:
        """Return the predicted loss that `max_loss` allows, in nats: `ln(1 + max_loss)`."""
        return None if self.max_loss is None else math.log1p(self.max_loss)

    @property
    def counts_stored(self) -> bool:
        """Return whether a cost is bytes of a packed page."""
        return self.stored_bits is not None or self.max_loss is not None

    @property
    def summary(self) -> dict[str, float]:
        """Return the limit by its name, for a plan's provenance."""
        if self.memory is not None:
            return {"memory": self.memory, "context": self.context, "batch": self.batch}
        return dict(self._limits) or {"share": self.share}

    def cost(self, tensor: AnyTensor, kind: Kind, cache: CacheSettings, heads: HeadGeometry) -> int:
        """Return the cost of one layer's keys or values. Raises ValueError if a head cannot be packed."""
        if self.memory is not None:
            at = (self.context, self.batch, self.element_bytes)
            return tensor_bytes(tensor, kind, cache, heads, *at).total
        if isinstance(tensor, TransformTensor):
            layout = transform_layout(tensor, kind, cache, heads.dim(kind))
            return layout.stored_bytes if self.counts_stored else layout.token_bits
        if self.counts_stored:
            return page_bytes(tensor, kind, cache, heads.dim(kind)) * heads.kv_heads
        return tensor.bits * heads.elements(kind)

    def allowance(self, cache: CacheSettings, model: ModelInfo) -> float:
        """Return the highest cost of all of a model's layers together, under a limit of bits or bytes."""
        limit = math.inf if self.limit is None else self.limit
        return limit if self.memory is not None else (limit + TOLERANCE) * self._per_bit(cache, model)

    def bits(self, cost: float, cache: CacheSettings, model: ModelInfo) -> float:
        """Return the mean bits per element of a model's layers that cost `cost`; not for a limit of memory."""
        return cost / self._per_bit(cache, model)

    def _per_bit(self, cache: CacheSettings, model: ModelInfo) -> float:
        """Return the cost of one bit per element in the keys and values of all of a model's layers."""
        elements = sum(heads.token_elements * len(layers) for heads, layers in model.geometries.items())
        return elements * (cache.page / 8 if self.counts_stored else 1)
