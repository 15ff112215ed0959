"""The tensors that `update()` gives to a model: a shape and a type, and numbers only once something touches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from kvmix_kernels.segments import Segments
from kvmix_kernels.summaries import Summarized
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import CacheError, PolicyError
from .observation import AttentionCall


class TransformingLayer(Protocol):
    """A layer whose stored keys and values are not the model's own, or that learns from queries."""

    def check(self, softcap: float | None, sinks: Tensor | None) -> None:
        """Raise PolicyError if this kind of attention cannot read the layer."""

    def query(self, query: Tensor) -> Tensor:
        """Return queries `[B, H, S, D]` transformed to meet the stored keys."""

    def output(self, output: Tensor) -> Tensor:
        """Return the output `[B, H, S, D_v]` over stored values, transformed back."""

    def observe(self, call: AttentionCall) -> None:
        """Learn from the queries of a forward."""


class Handle(Tensor):
    """A stand-in for stored keys or values `[B, H_kv, T, D]`.

    The attention function `kvmix` reads its segments and never dequantizes the whole. Any other operation does, on
    first touch, so every model stays correct under every attention implementation, only slower. Nothing can be written
    through a handle.

    Attributes:
        segments: the stored tokens.
        layer: the layer they belong to, if attention has more to do for it than to read them.
        restore: makes the model's own numbers of the stored ones, if they differ.
        is_current: says whether the store is as it was when the handle was made; None for a handle that lives no
            longer than a forward.
    """

    segments: Segments
    layer: TransformingLayer | None
    restore: Callable[[Tensor], Tensor] | None
    is_current: Callable[[], bool] | None
    _plain: Tensor | None

    @staticmethod
    def __new__(
        cls: type[Handle],
        segments: Segments,
        layer: TransformingLayer | None = None,
        restore: Callable[[Tensor], Tensor] | None = None,
        is_current: Callable[[], bool] | None = None,
    ) -> Handle:
        tail = segments.tail
        handle: Handle = torch.Tensor._make_wrapper_subclass(cls, segments.shape, dtype=tail.dtype, device=tail.device)
        handle.segments = segments
        handle.layer = layer
        handle.restore = restore
        handle.is_current = is_current
        handle._plain = None
        return handle

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Handle(shape={list(self.shape)}, packed={self.segments.packed_tokens})"

    @property
    def quantized_tokens(self) -> float:
        """Return the number of tokens that are read in quantized form, in the mean over KV heads."""
        return self.segments.quantized_tokens

    @property
    def evicted_tokens(self) -> float:
        """Return the number of tokens that are gone, in the mean over KV heads."""
        return self.shape[2] - self.segments.kept_tokens

    def unread_tokens(self, queries: int) -> float:
        """Return the number of tokens that a forward of so many queries leaves out, in the mean over KV heads."""
        packed = self.segments.packed
        return packed.unread(queries) if isinstance(packed, Summarized) else 0

    @property
    def is_raw(self) -> bool:
        """Return whether it stands for a model's own prompt, of which nothing has been stored yet."""
        return self.layer is not None and self.restore is None

    def dequantize(self) -> Tensor:
        """Return the plain tensor, kept as long as the handle.

        Raises:
            PolicyError: if some of its tokens have been evicted.
            CacheError: if the cache has changed since the handle was read from it.
        """
        if self._plain is None:
            self._check_readable()
            plain = self.segments.dequantize()
            plain = plain if self.restore is None else self.restore(plain)
            is_view = self.segments.shape[2] == self.segments.tail.shape[2]
            kept = is_view and self.is_current is not None
            self._plain = plain.clone() if kept else plain.contiguous()  # as a handle's strides say
        return self._plain

    def numpy(self, *, force: bool = False) -> Any:
        """Return the dequantized numbers as a NumPy array."""
        return self.dequantize().numpy(force=force)

    def tolist(self) -> Any:
        """Return the dequantized numbers as nested lists."""
        return self.dequantize().tolist()

    def __array__(self, dtype: Any = None) -> Any:
        return self.dequantize().__array__(dtype)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _written("assignment")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dequantize().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        _check_unwritten(func, args, kwargs or {})

        def plain(value: Any) -> Any:
            return value.dequantize() if isinstance(value, Handle) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def _check_readable(self) -> None:
        if self.is_current is not None and not self.is_current():
            raise CacheError(
                f"keys or values {list(self.shape)} were read from a cache that has changed since; "
                "read `cache.layers[i].keys` or `.values` again, or `.clone()` them before the cache changes"
            )
        if self.segments.kept_tokens < self.shape[2]:
            raise PolicyError(
                f"{self.shape[2] - self.segments.kept_tokens} of {self.shape[2]} tokens have been evicted, and this "
                "model's attention reads all of them; only attn_implementation='kvmix' can leave them out, or use a "
                "token policy without `evict`"
            )


def _check_unwritten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise CacheError if an operation would write to a handle."""
    if not func._schema.is_mutable:
        return
    for index, argument in enumerate(func._schema.arguments):
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        if isinstance(given, Handle) and argument.alias_info is not None and argument.alias_info.is_write:
            raise _written(f"`{func}`")


def _written(operation: str) -> CacheError:
    return CacheError(
        f"{operation} would write to keys or values that a kvmix cache stores, which cannot be changed in place; "
        "change a `.clone()` of them (head-wise presses of kvpress, which do so, need an unquantized cache)"
    )
