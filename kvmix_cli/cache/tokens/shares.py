"""What the layers of a cache keep of a prompt and later, shared out by what its attention was like in each of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from ...plan import Plan
from ...plan.tokens import LayerMeasure
from ...proportions import shared_out
from ..archive import Archive
from ..observation import AttentionCall
from ..policies.layers import LAYER_MEASURES


@dataclass(frozen=True)
class SharingLayer:
    """A layer that shares with others.

    Attributes:
        share: of the tokens that it keeps, or has in its tier, if all layers weigh as much.
        is_whole: it may keep all tokens; those of a tier leave a page.
        kind: widths and heads: what layers of another kind keep takes other bytes.
    """

    share: Fraction
    is_whole: bool
    kind: Hashable


class LayerShares:
    """Shares of tokens, decided once, when every layer has seen the first forward of a prompt.

    Layers that store a token in the same bytes have, of whatever leaves the window together, as many pages as the plan
    gives them, so that bytes are known beforehand. Each has one at least; the others are in proportion to the weight
    that the prompt's attention gives to the layer.

    Args:
        by: measure of attention.
        page: tokens of a page.
        layers: by index.
    """

    def __init__(self, by: LayerMeasure, page: int, layers: Mapping[int, SharingLayer]) -> None:
        self._by = by
        self._page = page
        self._layers = dict(layers)
        self._weights: dict[int, float] = {}
        self._waiting: list[Callable[[], None]] = []

    @classmethod
    def of_plan(cls, plan: Plan) -> LayerShares | None:
        """Return what the layers of a plan share; None if each has shares of its own."""
        by, layers = None if plan.cache.tokens is None else plan.cache.tokens.by_layer, {}
        for index, layer in plan.layers.items():
            policy = layer.settings(plan.cache).tokens if by is not None else None
            if policy is not None:
                kind = (layer.k, layer.v, plan.model.heads(index))
                layers[index] = SharingLayer(policy.shares[0], bool(policy.evict), kind)
        return None if by is None else cls(by, plan.cache.page, layers)

    @property
    def are_decided(self) -> bool:
        """Return whether all layers have seen a prompt."""
        return len(self._weights) == len(self._layers)

    def weight(self, layer: int) -> float | None:
        """Return the weight of a layer; None before it has seen a prompt."""
        return self._weights.get(layer)

    def see(self, layer: int, call: AttentionCall, keys: Tensor, pack: Callable[[], None]) -> None:
        """Measure a layer's prompt, unless that has been done, and let all layers pack after the last one.

        Args:
            layer: its index.
            call: with the prompt's queries.
            keys: `[B, H_kv, n, D]` of the prompt, as the queries meet them.
            pack: packs the layer's prompt.
        """
        if layer not in self._weights:
            self._waiting.append(pack)
            self.take(layer, LAYER_MEASURES[self._by](call, keys))

    def take(self, layer: int, weight: float) -> None:
        """Take the weight of a layer as it is; see `see`."""
        self._weights[layer] = weight
        if self.are_decided:
            waiting, self._waiting = self._waiting, []
            for pack in waiting:
                pack()

    def pages(self, layer: int, tokens: int) -> int:
        """Return the pages that a layer keeps, or has in its tier, of so many tokens that leave the window."""
        kind = self._layers[layer].kind
        alike = [index for index, each in self._layers.items() if each.kind == kind]
        total = sum(int(self._layers[index].share * tokens) // self._page for index in alike)
        most = [tokens // self._page - (1 if self._layers[index].is_whole else 2) for index in alike]
        found = shared_out(total - len(alike), [self._weights[index] for index in alike], most)
        return 1 + found[alike.index(layer)]

    def exchange(self, archive: Archive, layer: int) -> None:
        """Give the weight of a layer to an archive, or take it from one."""
        weight = archive.fact("weight", self.weight(layer))
        if not isinstance(weight, float) or not 0 <= weight <= 1:
            raise archive.fault("weight", f"is {weight!r}; expected a number from 0 to 1")
        self.take(layer, weight)

    def forget(self) -> None:
        """Start without a prompt."""
        self._weights.clear()
        self._waiting.clear()
