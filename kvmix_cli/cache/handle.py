"""What `update()` gives to a model: a tensor in shape and type only, until something touches it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from kvmix_kernels.segments import Segments
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import PolicyError

if TYPE_CHECKING:
    from .composed import ComposedLayer


class Handle(Tensor):
    """Stands for keys or values `[B, H_kv, T, D]` that are packed.

    The attention function `kvmix` unwraps it and never dequantizes the whole. Any other operation does, on first
    touch, so that every model stays correct under every attention implementation, only slower.

    Attributes:
        segments: what is stored.
        layer: whose they are, if attention has more to do for it than to read them.
        restore: what makes the model's own numbers of those that are stored, if they are not the same.
    """

    segments: Segments
    layer: ComposedLayer | None
    restore: Callable[[Tensor], Tensor] | None
    _plain: Tensor | None

    @staticmethod
    def __new__(
        cls: type[Handle],
        segments: Segments,
        layer: ComposedLayer | None = None,
        restore: Callable[[Tensor], Tensor] | None = None,
    ) -> Handle:
        tail = segments.tail
        handle: Handle = torch.Tensor._make_wrapper_subclass(cls, segments.shape, dtype=tail.dtype, device=tail.device)
        handle.segments = segments
        handle.layer = layer
        handle.restore = restore
        handle._plain = None
        return handle

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Handle(shape={list(self.shape)}, packed={self.segments.packed_tokens})"

    @property
    def is_raw(self) -> bool:
        """Whether what is held is a model's own prompt, of which nothing has been stored yet."""
        return self.layer is not None and self.restore is None

    def dequantize(self) -> Tensor:
        """The plain tensor; kept for the handle's life, which is one layer of one forward.

        Raises:
            PolicyError: if some of its tokens have been evicted.
        """
        if self._plain is None:
            if self.segments.kept_tokens < self.shape[2]:
                raise PolicyError(
                    "tokens have been evicted, and this model's attention reads all of them; only "
                    "attn_implementation='kvmix' can leave them out, or use a token policy without `evict`"
                )
            plain = self.segments.dequantize()
            self._plain = plain if self.restore is None else self.restore(plain)
        return self._plain

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def plain(value: Any) -> Any:
            return value.dequantize() if isinstance(value, Handle) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
