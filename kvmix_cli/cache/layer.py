"""One model layer's cache, as transformers sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from kvmix_kernels.layout import FULL_PRECISION_BITS, Kind
from kvmix_kernels.segments import Segments
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..codecs.vectors import LearnedVectors
from ..errors import CacheError, PlanError
from ..plan import CacheSettings, LayerPlan, TensorPlan
from ..plan.forms import storage_forms
from ..plan.sizes import transform_layout, window_widths
from .archive import Archive
from .bases import basis_of
from .codebooks import books_of, turns_of
from .handle import Handle
from .packing import CodecPacking, CodePacking, Packing, PolicyFunctions, SummaryPacking, packing_of
from .store import Store
from .tokens.exact import ExactTokens


class MixedLayer(CacheLayerMixin):
    """Keys and values of one layer at the plan's bits.

    The first `update` returns the keys and values it was given, so a prompt attends to itself in full precision.
    Later ones return plain views where nothing is quantized, and handles where something is.
    """

    is_sliding = False
    is_croppable = True
    _exact: ExactTokens | None = None

    def __init__(self, index: int, plan: LayerPlan, settings: CacheSettings, reserve: int = 0) -> None:
        self._stores: tuple[Store, Store] | None = None
        self.index = index
        self.plan = plan
        self.settings = settings
        self._reserve = reserve
        super().__init__()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the stores for the heads that arrive. Raises PlanError if they cannot be packed."""
        self.dtype, self.device, self._kv_heads = key_states.dtype, key_states.device, key_states.shape[1]
        functions = self._policy_functions()
        try:
            keys = self._packing("key", key_states.shape[-1], functions[0])
            values = self._packing("value", value_states.shape[-1], functions[1])
        except ValueError as error:
            raise PlanError(f"layer {self.index} cannot be quantized: {error}; or give it 16 bits") from error
        k_bits, v_bits = window_widths(self.plan, self.settings)
        self._stores = self._store(keys, k_bits), self._store(values, v_bits)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add `[B, H_kv, S, D]` keys and values and return all of them, `[B, H_kv, T, D]`.

        Raises:
            CacheError: if keys and values are not of the same sequences, heads and tokens, or have another batch size
                or other heads than what is held; nothing is added then.
            QuantizationError: if what has to be packed is NaN, infinite, or beyond the scale's range.
        """
        self._prepare(key_states, value_states)
        first = self.get_seq_length() == 0
        keys, values = self._add(key_states, value_states)
        self._pack_early()
        if first:
            return key_states, value_states
        if all(segments.packed is None and segments.sink is None for segments in (keys, values)):
            return keys.tail, values.tail
        return Handle(keys), Handle(values)

    @property
    def keys(self) -> Tensor | None:
        """Return the keys `[B, H_kv, T, D]` held now, dequantized when they are touched; None before the first."""
        return self._read(0)

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._refuse_assignment("keys", states)

    @property
    def values(self) -> Tensor | None:
        """Return the values `[B, H_kv, T, D_v]` held now, dequantized when they are touched; None before the first."""
        return self._read(1)

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._refuse_assignment("values", states)

    @property
    def stores(self) -> tuple[Store, Store]:
        """Return the stores of keys and of values."""
        if self._stores is None:
            raise RuntimeError(f"layer {self.index} has seen no tokens yet")
        return self._stores

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        return sum(store.nbytes for store in self._stores or ())

    @property
    def state_nbytes(self) -> int:
        """Return the bytes kept beside keys and values; none here."""
        return 0

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes held, room to grow included."""
        return sum(store.allocated_bytes for store in self._stores or ())

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return 0 if self._stores is None else self._stores[0].length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the mask for the next `query_length` tokens."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._stores = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; see `Store.crop` for what is exact. Raises ValueError."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove:
            for store in self._stores or ():
                store.crop(-tokens_to_remove)

    def cut(self, tokens: int) -> int:
        """Return the longest length, at most `tokens`, that `crop` can go back to without decoding a packed token."""
        return min((store.cut(tokens) for store in self._stores or ()), default=0)

    def exchange(self, archive: Archive, examples: tuple[Tensor, Tensor]) -> None:
        """Give everything held to an archive, or take it from one, empty as this layer is then.

        What is given has been packed as far as the next forward would pack it before anything else.

        Args:
            archive: of this layer.
            examples: keys and values without tokens, `[B, H_kv, 0, D]`, in the model's dtype and on the layer's device.

        Raises:
            CacheError: if the archive does not have what this layer of the plan must hold.
            PlanError: if these heads cannot be packed.
        """
        if self._stores is None:
            self.lazy_initialization(*examples)
        self._pack_early()  # in case that a forward has failed before it
        self._in_step(Store.finish)
        for name, store, example in zip(("keys", "values"), self.stores, examples, strict=True):
            store.exchange(archive.part(name, example))
            if store.length != archive.tokens:
                raise archive.fault(name, f"has {store.length} tokens; expected {archive.tokens}")

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

    def _policy_functions(self) -> tuple[PolicyFunctions | None, PolicyFunctions | None]:
        """Return what chooses the tiers and orders the channels of keys and of values."""
        return None, None

    def _packing(self, kind: Kind, head_dim: int, functions: PolicyFunctions | None) -> Packing | None:
        """Return the storage of keys, or values, that leave the window. Raises ValueError if they cannot be packed."""
        packing = self._plain_packing(kind, head_dim, functions)
        reading = self.settings.reading
        if packing is None or reading is None or kind == "value":
            return packing
        is_choosing = self.index >= reading.skip and self.plan.v.window_bits != FULL_PRECISION_BITS
        return SummaryPacking(packing, reading, is_choosing)

    def _plain_packing(self, kind: Kind, head_dim: int, functions: PolicyFunctions | None) -> Packing | None:
        """Return the same, without summaries of pages."""
        tensor, name = self.plan.k if kind == "key" else self.plan.v, f"layer {self.index} {kind}s"
        if isinstance(tensor, TensorPlan):
            forms = storage_forms(tensor, kind, self.settings, head_dim)
            if isinstance(codec := forms[0].groups[0], LearnedVectors):
                return self._learned_packing(name, codec)
            return packing_of(name, forms, self.settings, self._reserve, functions)
        if self.settings.transform is None:
            raise AssertionError("a plan with transform codes has their basis")
        layout = transform_layout(tensor, kind, self.settings, head_dim)
        basis = basis_of(self.settings.transform, self.index, layout, self.device, self.dtype)
        return CodePacking(name, basis, self._room, self._exact)

    def _learned_packing(self, name: str, codec: LearnedVectors) -> CodecPacking:
        """Return storage by codebooks that were learned from a model's keys, as they are before RoPE, or its values."""
        books = books_of(self.settings, self.index, codec, self._kv_heads, self.device)
        turns = turns_of(self.settings, self.index) if codec.kind == "key" else None
        return CodecPacking(name, replace(codec, books=books), self._room, turns)

    @property
    def _room(self) -> int:
        """Return the pages to make room for at first."""
        return max(0, self._reserve - self.settings.sink) // self.settings.page

    def _store(self, packing: Packing | None, bits: int) -> Store:
        return Store(packing, self.settings, bits, self._reserve)

    def _prepare(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the stores before the first tokens, and refuse tokens that do not fit each other or the ones held."""
        shapes = tuple(key_states.shape), tuple(value_states.shape)
        if {len(shape) for shape in shapes} != {4} or shapes[0][:3] != shapes[1][:3]:
            raise CacheError(
                f"layer {self.index} was given keys {list(shapes[0])} and values {list(shapes[1])}; expected "
                "[batch, KV heads, tokens, channels] of both, which may differ in channels alone"
            )
        if self._stores is None:
            self.lazy_initialization(key_states, value_states)
        for name, store, new in zip(("keys", "values"), self.stores, (key_states, value_states), strict=True):
            held, given = store.rows, _rows(new)
            if held is not None and held != given:
                raise CacheError(
                    f"layer {self.index} holds {name} of {_shape(held)}, and was given {_shape(given)}; use a new "
                    "cache, or `batch_repeat_interleave` or `batch_select_indices` to change its batch"
                )

    def _add(self, keys: Tensor, values: Tensor) -> tuple[Segments, Segments]:
        """Settle what the last tokens left to do, and put new ones into the stores."""
        self._in_step(Store.settle)
        return self.stores[0].add(keys), self.stores[1].add(values)

    def _pack_early(self) -> None:
        self._in_step(Store.pack_early)

    def _in_step(self, pack: Callable[[Store], int]) -> tuple[int, int]:
        """Let keys, then values pack; return how many of each have left their tail."""
        keys, values = self.stores
        return pack(keys), pack(values)

    def _read(self, index: int) -> Tensor | None:
        """Return what one store holds, as a handle that refuses to be read once the store has changed."""
        if self._stores is None:
            return None
        store = self._stores[index]
        if store.rows is None:
            return torch.empty(0, dtype=self.dtype, device=self.device)
        return self._handle(index, store.segments(), store.is_unchanged())

    def _handle(self, index: int, segments: Segments, is_current: Callable[[], bool] | None) -> Handle:
        return Handle(segments, is_current=is_current)

    def _refuse_assignment(self, name: str, states: Tensor | None) -> None:
        if states is not None:  # transformers' own constructor assigns None
            raise CacheError(
                f"layer {self.index}: the {name} of a kvmix cache cannot be assigned; use `update`, `crop` and the "
                "batch operations, or an unquantized cache"
            )

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        for store in self._stores or ():
            store.apply(change)


def _rows(states: Tensor) -> tuple[int, int, int]:
    batch, heads, _, width = states.shape
    return batch, heads, width


def _shape(rows: tuple[int, int, int]) -> str:
    return "{} sequences x {} KV heads x {} channels".format(*rows)
