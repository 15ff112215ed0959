"""Levels of width: layers move up one level at a time, keys and values together.

With `L` layers and `moves = L * level + h`, the first `h` layers of an order are at `level + 1` and the rest at
`level`. Keys and values each have their own order and make the same number of moves (KVmix, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from kvmix_kernels.layout import Kind

from ..plan import LayerPlan
from ..plan.layers import AnyTensor

TensorCost = Callable[[int, Kind, AnyTensor], int]
"""Cost of a layer's keys, or values, see `Budget.cost`."""


class Levels:
    """The levels that layers can be at.

    Args:
        layers: indices of the layers.
        k_bits, v_bits: widths from the lowest level up, ascending; the shorter list repeats its last width.
        cost: cost of a layer's keys, or values.

    Attributes:
        levels: storage of a layer at each level.
        moves: moves of one layer by one level, from all layers at the lowest level to all at the highest.
    """

    def __init__(self, layers: Sequence[int], k_bits: Sequence[int], v_bits: Sequence[int], cost: TensorCost) -> None:
        top = max(len(k_bits), len(v_bits)) - 1
        self.levels = [
            LayerPlan.of_bits(k_bits[min(level, len(k_bits) - 1)], v_bits[min(level, len(v_bits) - 1)])
            for level in range(top + 1)
        ]
        self.moves = len(layers) * top
        self._layers = layers
        self._cost = cost

    def costs(self, k_order: Sequence[int], v_order: Sequence[int]) -> list[int]:
        """Return the cost of all layers after each number of moves in these orders, from none to all."""
        costs = [self._whole(self.levels[0])]
        for below, above in pairwise(self.levels):
            for k_layer, v_layer in zip(k_order, v_order, strict=True):
                rise = self._cost(k_layer, "key", above.k) - self._cost(k_layer, "key", below.k)
                rise += self._cost(v_layer, "value", above.v) - self._cost(v_layer, "value", below.v)
                costs.append(costs[-1] + rise)
        return costs

    def mean_cost_after(self, moves: int) -> int:
        """Return the cost of all layers after that many moves, on the average of all orders."""
        level, higher = divmod(moves, len(self._layers) or 1)
        cost = self._whole(self.levels[level])
        return cost + higher * (self._whole(self.levels[level + 1]) - cost) // len(self._layers) if higher else cost

    def _whole(self, level: LayerPlan) -> int:
        return sum(self._cost(layer, kind, tensor) for layer in self._layers for tensor, kind in level.tensors)

    def after(self, moves: int, k_order: Sequence[int], v_order: Sequence[int]) -> dict[int, LayerPlan]:
        """Return the storage of all layers after that many moves in these orders."""
        level, higher = divmod(moves, len(self._layers) or 1)
        levels = [*self.levels, self.levels[-1]]
        k_above, v_above = set(k_order[:higher]), set(v_order[:higher])
        return {
            layer: LayerPlan(k=levels[level + (layer in k_above)].k, v=levels[level + (layer in v_above)].v)
            for layer in self._layers
        }
