"""Bits for single directions: reverse water-filling over all layers, KV heads, keys and values.

Half the squared error of a direction is an expected loss in nats a predicted token (`plan.tensors.metric`), and the
quantizer of `w` bits leaves the share `LEFT[w]` of a direction's variance `l`. The next bit is therefore worth
`l (LEFT[w] - LEFT[w + 1]) / 2` nats wherever it goes, and each is worth less than the one before. The plan of least
loss takes bits in the order of their worth until the budget is spent (Cover and Thomas, section 10.3.3).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from kvmix_kernels.transform_layout import LEFT, MAX_WIDTH, RUN
from numpy.typing import NDArray

Tensor = TypeVar("Tensor", bound=Hashable)
Widths = NDArray[np.int64]
_KEPT = np.array([LEFT[width] for width in range(MAX_WIDTH + 1)])


def expected_loss(variances: NDArray[np.float64], widths: Sequence[Sequence[int]]) -> float:
    """Return the loss of coding directions of variances `[H_kv, D]` at these widths of runs, in nats a token."""
    kept = np.repeat(_KEPT[np.array(widths)], RUN, axis=1)[:, : variances.shape[1]]
    return float((variances * kept).sum()) / 2


@dataclass(frozen=True)
class Filling(Generic[Tensor]):
    """Bits in the order of their worth.

    Attributes:
        shapes: of each tensor, KV heads and runs of directions.
        unit: of each bit, its run among those of all tensors.
        directions: of each bit, directions of its run: the code bits a token that it takes.
        worth: of each bit, nats a token that it saves, falling per direction.
        variance: of each run, the summed variance of its directions.
        levels: widths that a direction may have, ascending from 0. What is said of bits holds for steps from one to the
            next, which take and save as much as all of their bits.
    """

    shapes: Mapping[Tensor, tuple[int, int]]
    unit: NDArray[np.int64]
    directions: NDArray[np.int64]
    worth: NDArray[np.float64]
    variance: NDArray[np.float64]
    levels: NDArray[np.int64] = field(default_factory=lambda: np.arange(MAX_WIDTH + 1))

    @classmethod
    def of(
        cls, variances: Mapping[Tensor, NDArray[np.float64]], widths: Sequence[int] | None = None
    ) -> Filling[Tensor]:
        """Return the order of the bits of tensors with these variances of directions, `[H_kv, D]`, falling.

        Args:
            widths: widths that a direction may have besides 0; None for all.
        """
        levels = np.array(sorted({0, *(range(MAX_WIDTH + 1) if widths is None else widths)}))
        height = np.diff(levels)
        sums, sizes, shapes = [], [], {}
        for name, lengths in variances.items():
            starts = np.arange(0, lengths.shape[1], RUN)
            runs = np.add.reduceat(lengths, starts, axis=1)
            shapes[name] = (runs.shape[0], runs.shape[1])
            sums.append(runs.ravel())
            sizes.append(np.tile(np.diff(np.append(starts, lengths.shape[1])), runs.shape[0]))
        variance, size = np.concatenate(sums), np.concatenate(sizes)
        saved = -np.diff(_KEPT[levels]) / 2 / height
        each = (variance / size)[:, None] * saved  # [runs, steps], nats a bit, falling along both
        order = np.argsort(-each, axis=None, kind="stable")
        order = order[each.ravel()[order] > 0]  # nobody reads a direction without variance
        unit, step = np.divmod(order, len(height))
        taken = size[unit] * height[step]
        return cls(shapes, unit, taken, each.ravel()[order] * taken, variance, levels)

    @property
    def nothing(self) -> float:
        """Return the loss if every token were its mean, in nats."""
        return float(self.variance.sum()) / 2

    @property
    def lowest(self) -> float:
        """Return the loss of the widest widths, in nats."""
        return self.nothing - float(self.worth.sum())

    @property
    def most(self) -> int:
        """Return the code bits a token of the widest widths that are of any use."""
        return int(self.directions.sum())

    def within(self, bits: float) -> int:
        """Return how many bits, in order, take at most `bits` code bits a token, summed over all tensors."""
        return int(np.searchsorted(np.cumsum(self.directions), bits, side="right"))

    def affording(self, cost: Callable[[int], int], allowance: float) -> int:
        """Return the most bits, in order, whose cost is within an allowance; none at all must be within it.

        The search begins where a cost proportional to code bits would meet the allowance, and leaves that place in
        growing steps. A cost is that of a whole plan: four of them are worked out, not one for every halving.
        """
        low, high, step = 0, len(self.worth) + 1, 1  # within the allowance, and beyond it
        floor, most = cost(0), cost(len(self.worth))
        place = max(1, self.within(self.most * (allowance - floor) / max(1, most - floor)))
        while low < place < high:
            if cost(place) <= allowance:
                low, place = place, place + step
            else:
                high, place = place, place - step
            step *= 2
        return low + bisect_right(range(low + 1, high), allowance, key=cost)

    def reaching(self, loss: float) -> int:
        """Return how many bits, in order, bring the loss down to `loss` nats; all of them if none do."""
        left = self.nothing - np.cumsum(self.worth)
        return 0 if self.nothing <= loss else min(len(left), int(np.searchsorted(-left, -loss)) + 1)

    def loss(self, count: int) -> float:
        """Return the loss after the first `count` bits, in nats."""
        return self.nothing - float(self.worth[:count].sum())

    def widths(self, count: int) -> dict[Tensor, Widths]:
        """Return the widths `[H_kv, runs]` of every tensor after the first `count` bits."""
        taken = np.bincount(self.unit[:count], minlength=len(self.variance))
        found, start = {}, 0
        for name, (heads, runs) in self.shapes.items():
            found[name] = self.levels[taken[start : start + heads * runs]].reshape(heads, runs)
            start += heads * runs
        return found
