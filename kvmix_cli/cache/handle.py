"""What `update()` gives to a model: a tensor in shape and type only, until something touches it."""

from __future__ import annotations

from typing import Any

import torch
from kvmix_kernels.segments import Segments
from torch import Tensor
from torch.utils._pytree import tree_map


class Handle(Tensor):
    """Stands for keys or values `[B, H_kv, T, D]` that are packed.

    The attention function `kvmix` unwraps it and never dequantizes the whole. Any other operation does, on first
    touch, so that every model stays correct under every attention implementation, only slower.
    """

    segments: Segments
    _plain: Tensor | None

    @staticmethod
    def __new__(cls: type[Handle], segments: Segments) -> Handle:
        tail = segments.tail
        handle: Handle = torch.Tensor._make_wrapper_subclass(cls, segments.shape, dtype=tail.dtype, device=tail.device)
        handle.segments = segments
        handle._plain = None
        return handle

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Handle(shape={list(self.shape)}, packed={self.segments.packed_tokens})"

    def dequantize(self) -> Tensor:
        """The plain tensor; kept for the handle's life, which is one layer of one forward."""
        if self._plain is None:
            self._plain = self.segments.dequantize()
        return self._plain

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def plain(value: Any) -> Any:
            return value.dequantize() if isinstance(value, Handle) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
