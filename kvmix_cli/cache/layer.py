"""One model layer's cache, as transformers sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..errors import PlanError
from ..plan import CacheSettings, LayerPlan
from ..plan.sizes import storage_forms
from .handle import Handle
from .packing import Packing, Sorts, packing_of
from .store import Store


class MixedLayer(CacheLayerMixin):
    """Keys and values of one layer at the plan's bits.

    The first `update` returns the keys and values it was given, so a prompt attends to itself in full precision.
    Later ones return plain views where nothing is quantized, and handles where something is.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, index: int, plan: LayerPlan, settings: CacheSettings, reserve: int = 0) -> None:
        super().__init__()
        self.index = index
        self.plan = plan
        self.settings = settings
        self._reserve = reserve
        self._stores: tuple[Store, Store] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the stores for the heads that arrive. Raises PlanError if they cannot be packed."""
        self.dtype, self.device = key_states.dtype, key_states.device
        heads = key_states.shape[-1], value_states.shape[-1]
        try:
            found = [
                storage_forms(tensor, kind, self.settings, head_dim)
                for (tensor, kind), head_dim in zip(self.plan.tensors, heads, strict=True)
            ]
        except ValueError as error:
            raise PlanError(f"layer {self.index} cannot be quantized: {error}; give it 16 bits") from error
        keys, values = (
            packing_of(f"layer {self.index} {kind}s", form, self.settings, self._reserve, sorts)
            for (_, kind), form, sorts in zip(self.plan.tensors, found, self._sorts(), strict=True)
        )
        self._stores = self._store(keys, self.plan.k.bits), self._store(values, self.plan.v.bits)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add `[B, H_kv, S, D]` keys and values; returns all of them, `[B, H_kv, T, D]`. Raises QuantizationError."""
        if self._stores is None:
            self.lazy_initialization(key_states, value_states)
        first = self.get_seq_length() == 0
        keys, values = (store.append(new) for store, new in zip(self.stores, (key_states, value_states), strict=True))
        if first:
            return key_states, value_states
        if keys.packed is None and values.packed is None and keys.sink is None and values.sink is None:
            return keys.tail, values.tail
        return Handle(keys), Handle(values)

    def _sorts(self) -> tuple[Sorts | None, Sorts | None]:
        """Who sorts the tokens and channels of keys and of values."""
        return None, None

    def _store(self, packing: Packing | None, bits: int) -> Store:
        return Store(packing, self.settings, bits, self._reserve)

    @property
    def stores(self) -> tuple[Store, Store]:
        """Keys and values."""
        if self._stores is None:
            raise RuntimeError(f"layer {self.index} has seen no tokens yet")
        return self._stores

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return sum(store.nbytes for store in self._stores or ())

    @property
    def allocated_bytes(self) -> int:
        """Bytes held, with the room to grow."""
        return sum(store.allocated_bytes for store in self._stores or ())

    def get_seq_length(self) -> int:
        """Tokens held."""
        return 0 if self._stores is None else self._stores[0].length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask for the next `query_length` tokens."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._stores = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; see `Store.crop` for what is exact."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove:
            for store in self._stores or ():
                store.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the given batch rows, in this order (beam search)."""
        self._apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        self._apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        self._apply(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._apply(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        self._apply(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        for store in self._stores or ():
            store.apply(change)
