"""Layers that keep more than keys and values: an indexer's keys (sparse attention), a recurrent state (hybrid layers).

What a stock layer keeps beside keys and values stays in a stock layer, whose own keys and values stay empty; the model
finds its methods and attributes on the quantized layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ..plan import CacheSettings, LayerPlan
from .archive import Archive
from .layer import MixedLayer
from .sizes import stock_nbytes
from .stock import exchange_stock, stock_cut

OWN = ("dtype", "device")
"""Attributes of both that differ: a state may have another dtype than keys and values."""


class StatefulLayer(MixedLayer):
    """Keys and values at a plan's bits, beside the state of a stock layer.

    Attributes:
        state: stock layer of the same kind, for everything but keys and values.
    """

    state: Any = None

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Return whether tokens can be taken back without a trace, from the state as well."""
        return bool(self.state.is_croppable)

    @property
    def state_nbytes(self) -> int:
        """Return the bytes of the state, which is never quantized."""
        return stock_nbytes(self.state)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.state.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, as `MixedLayer.crop` and as the state's own `crop` do."""
        self.state.crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def cut(self, tokens: int) -> int:
        """Return the longest length that keys, values and state can go back to; see `MixedLayer.cut`."""
        return stock_cut(self.state, super().cut(tokens), self.get_seq_length())

    def exchange(self, archive: Archive, examples: tuple[Tensor, Tensor]) -> None:
        """Give everything held to an archive, or take it; see `MixedLayer.exchange`."""
        super().exchange(archive, examples)
        exchange_stock(self.state, archive.part("state", examples[0]))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the given batch rows, in this order (beam search)."""
        self.state.reorder_cache(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        self.state.batch_repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        self.state.batch_select_indices(indices)
        super().batch_select_indices(indices)

    def offload(self) -> None:
        """Move everything to the CPU."""
        self.state.offload()
        super().offload()

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        if getattr(self.state, "device", None) is None:
            self.state.device = self.device
        self.state.prefetch()
        super().prefetch()

    def __getattr__(self, name: str) -> Any:
        """Return what only the state has."""
        return getattr(self.state, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what only the state has on the state: models write some of it."""
        known = name in self.__dict__ or name in OWN or hasattr(type(self), name)
        is_own = known or not hasattr(self.state, name)
        if is_own:
            super().__setattr__(name, value)
        else:
            setattr(self.state, name, value)


def layer_beside(
    state: Any, kind: type[MixedLayer], index: int, plan: LayerPlan, settings: CacheSettings, reserve: int
) -> MixedLayer:
    """Return an empty layer of a kind in place of a stock layer, beside that layer's state if it has any.

    Args:
        state: stock layer, empty.
        kind: `MixedLayer` or `ComposedLayer`; the other arguments are theirs.
    """
    if type(state) is DynamicLayer:
        return kind(index, plan, settings, reserve)
    made = _CLASSES.get((kind, type(state))) or _class_beside(kind, type(state))
    layer = made(index, plan, settings, reserve)
    layer.state = state
    return layer


def _class_beside(kind: type[MixedLayer], stock: type[CacheLayerMixin]) -> type[StatefulLayer]:
    """Return the class for states of a stock class; transformers takes its layers for ones of the stock class."""
    made = type(f"{kind.__name__}Beside{stock.__name__}", (StatefulLayer, kind), {})
    stock.register(made)
    _CLASSES[kind, stock] = made
    return made


_CLASSES: dict[tuple[type[MixedLayer], type[CacheLayerMixin]], type[StatefulLayer]] = {}
"""Classes that were made, by the kind of layer and the class of its state."""
