"""A layer whose KV heads are stored in groups, each as a layer of its own, and attended to one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from kvmix_kernels.segments import Segments
from torch import Tensor

from ..plan import CacheSettings, LayerPlan
from .archive import Archive
from .handle import Handle
from .layer import MixedLayer

Group = tuple[tuple[int, ...], MixedLayer]
"""KV heads, and the layer that stores them."""


class GroupedHandle(Handle):
    """A stand-in for the keys, or values, of all groups of a layer's KV heads, `[B, H_kv, T, D]`.

    Attributes:
        parts: handles, or tensors, of each group.
        heads: `[n]` int64, the KV heads of each group.
    """

    parts: tuple[Tensor, ...]
    heads: tuple[Tensor, ...]

    @staticmethod
    def of_parts(parts: Sequence[Tensor], heads: Sequence[Sequence[int]]) -> GroupedHandle:
        """Return a handle for parts `[B, n, T, D]`, whose heads are all of a layer's together."""
        first = parts[0]
        shape = torch.Size((first.shape[0], sum(map(len, heads)), *first.shape[2:]))
        nothing = torch.empty((), dtype=first.dtype, device=first.device).expand(shape)
        handle = Handle.__new__(GroupedHandle, Segments(None, None, nothing))
        if not isinstance(handle, GroupedHandle):
            raise AssertionError("a class makes its own instances")
        handle.parts, handle.heads = tuple(parts), tuple(torch.tensor(group) for group in heads)
        return handle

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GroupedHandle(shape={list(self.shape)}, groups={[len(group) for group in self.heads]})"

    @property
    def quantized_tokens(self) -> float:
        """Return the number of tokens that are read in quantized form, in the mean over KV heads."""
        return self._mean([part.quantized_tokens if isinstance(part, Handle) else 0.0 for part in self.parts])

    @property
    def evicted_tokens(self) -> float:
        """Return the number of tokens that are gone, in the mean over KV heads."""
        return self._mean([part.evicted_tokens if isinstance(part, Handle) else 0.0 for part in self.parts])

    def unread_tokens(self, queries: int) -> float:
        """Return the number of tokens that a forward of so many queries leaves out, in the mean over KV heads."""
        return self._mean([part.unread_tokens(queries) if isinstance(part, Handle) else 0.0 for part in self.parts])

    def dequantize(self) -> Tensor:
        """Return the plain tensor, kept as long as the handle; see `Handle.dequantize`."""
        if self._plain is None:
            plain = [part.dequantize() if isinstance(part, Handle) else part for part in self.parts]
            order = torch.cat(self.heads).argsort().to(self.device)
            self._plain = torch.cat(plain, dim=1).index_select(1, order)
        return self._plain

    def _mean(self, of_parts: Sequence[float]) -> float:
        return sum(n * len(group) for n, group in zip(of_parts, self.heads, strict=True)) / self.shape[1]


class GroupedLayer(MixedLayer):
    """Keys and values of one layer, its KV heads in groups that are stored and attended to one by one.

    Args:
        index: of the layer.
        plan: of the layer.
        settings: of the plan's cache.
        groups: KV heads with the layers that store them, each head in one group.
    """

    def __init__(self, index: int, plan: LayerPlan, settings: CacheSettings, groups: Sequence[Group]) -> None:
        super().__init__(index, plan, settings)
        self._groups = tuple(groups)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the stores of all groups for the heads that arrive. Raises PlanError if they cannot be packed."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for heads, layer in self._groups:
            layer.lazy_initialization(key_states[:, list(heads)], value_states[:, list(heads)])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values `[B, H_kv, S, D]`; see `MixedLayer.update`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        first = self.get_seq_length() == 0
        pairs = [
            layer.update(key_states[:, list(heads)], value_states[:, list(heads)], *args, **kwargs)
            for heads, layer in self._groups
        ]
        if first and not any(isinstance(each, Handle) for pair in pairs for each in pair):
            return key_states, value_states
        keys, values = zip(*pairs, strict=True)
        return self._together(keys), self._together(values)

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        return sum(layer.nbytes for _, layer in self._groups)

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes held, room to grow included."""
        return sum(layer.allocated_bytes for _, layer in self._groups)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Return the groups of KV heads, with the layers that store them."""
        return self._groups

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self._groups[0][1].get_seq_length()

    def reset(self) -> None:
        """Forget everything."""
        for _, layer in self._groups:
            layer.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, of groups that may have evicted some of the others first.

        Raises:
            PlanError: if a group has evicted what would come back; no other group has forgotten anything then, unless
                several may evict, and only some of them have.
        """
        for _, layer in sorted(self._groups, key=lambda group: group[1].settings.tokens is None):
            layer.crop(tokens_to_remove)

    def cut(self, tokens: int) -> int:
        """Return the longest length, at most `tokens`, that all groups can go back to; see `MixedLayer.cut`."""
        while tokens and (shorter := min(layer.cut(tokens) for _, layer in self._groups)) < tokens:
            tokens = shorter
        return tokens

    def exchange(self, archive: Archive, examples: tuple[Tensor, Tensor]) -> None:
        """Give everything held to an archive, or take it; see `MixedLayer.exchange`."""
        self.dtype, self.device = examples[0].dtype, examples[0].device
        for number, (heads, layer) in enumerate(self._groups):
            own = examples[0][:, list(heads)], examples[1][:, list(heads)]
            layer.exchange(archive.part(f"heads.{number}", own[0]), own)
        self.is_initialized = True

    def _read(self, index: int) -> Tensor | None:
        parts = [layer.keys if index == 0 else layer.values for _, layer in self._groups]
        return (
            None
            if any(part is None for part in parts)
            else self._together([part for part in parts if part is not None])
        )

    def _together(self, parts: Sequence[Tensor]) -> GroupedHandle:
        return GroupedHandle.of_parts(parts, [heads for heads, _ in self._groups])

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        for _, layer in self._groups:
            layer._apply(change)
