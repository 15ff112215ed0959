"""Levels of width: layers move up one level at a time, keys and values together.

With `L` layers and `moves = L * level + h`, the first `h` layers of an order are at `level + 1` and the rest at
`level`. Keys and values each have their own order and make the same number of moves (KVmix, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..plan import LayerPlan


class Levels:
    """The levels that layers can be at.

    Args:
        layers: indices of the layers.
        k_bits, v_bits: widths from the lowest level up, ascending; the shorter list repeats its last width.
        cost: cost of one layer, see `Budget.cost`.

    Attributes:
        levels: storage of a layer at each level.
        moves: moves of one layer by one level, from all layers at the lowest level to all at the highest.
    """

    def __init__(
        self, layers: Sequence[int], k_bits: Sequence[int], v_bits: Sequence[int], cost: Callable[[LayerPlan], int]
    ) -> None:
        top = max(len(k_bits), len(v_bits)) - 1
        self.levels = [
            LayerPlan.of_bits(k_bits[min(level, len(k_bits) - 1)], v_bits[min(level, len(v_bits) - 1)])
            for level in range(top + 1)
        ]
        self.moves = len(layers) * top
        self._layers = layers
        self._costs = [cost(level) for level in self.levels]

    def cost_after(self, moves: int) -> int:
        """Return the cost of all layers after that many moves."""
        level, higher = divmod(moves, len(self._layers) or 1)
        rise = self._costs[level + 1] - self._costs[level] if higher else 0
        return len(self._layers) * self._costs[level] + higher * rise

    def after(self, moves: int, k_order: Sequence[int], v_order: Sequence[int]) -> dict[int, LayerPlan]:
        """Return the storage of all layers after that many moves in these orders."""
        level, higher = divmod(moves, len(self._layers) or 1)
        levels = [*self.levels, self.levels[-1]]
        k_above, v_above = set(k_order[:higher]), set(v_order[:higher])
        return {
            layer: LayerPlan(k=levels[level + (layer in k_above)].k, v=levels[level + (layer in v_above)].v)
            for layer in self._layers
        }
