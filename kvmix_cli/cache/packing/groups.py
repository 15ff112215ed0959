"""Pages of one channel group, in codes or in full precision; the group may be the whole head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kvmix_kernels.layout import Encoder, PageLayout
from kvmix_kernels.pages import Packed, Plain
from kvmix_kernels.quantize import quantize_into
from kvmix_kernels.quantize.finite import FiniteWatch
from torch import Tensor

from ...errors import QuantizationError
from ..archive import Archive
from ..buffer import Buffer

PAGES_AT_ONCE = 32
"""Pages that are quantized together; bounds the float32 temporaries of a long prompt."""
NOT_FINITE = "NaN or Inf among the values to quantize; the model itself has overflowed, try another dtype"


class QuantizedGroup:
    """Pages of a channel group that are quantized as they arrive, once.

    Args:
        name: of the tensor, for errors, e.g. `layer 3 keys`.
        layout: of every page.
        reserve: pages to make room for at first.
        encoder: how scales and zeros are chosen.
    """

    def __init__(self, name: str, layout: PageLayout, reserve: int = 0, encoder: Encoder = "minmax") -> None:
        self.name = name
        self.layout = layout
        self.encoder = encoder
        self._words = Buffer(reserve)
        self._scales = Buffer(reserve)
        self._held: Packed | None = None
        self._watch = FiniteWatch()

    @property
    def width(self) -> int:
        """Return the number of channels."""
        return self.layout.head_dim

    @property
    def view(self) -> Packed:
        """Return what is held, without a copy: one object until that changes."""
        words, scales, held = self._words.view, self._scales.view, self._held
        if held is None or held.words is not words or held.scales is not scales:
            held = self._held = Packed(self.layout, words, scales)
        return held

    def pack(self, pages: Tensor) -> None:
        """Append `[B, H_kv, n, page, width]`.

        Raises:
            QuantizationError: for numbers that cannot be quantized; nothing is appended then. On a GPU, which is not
                waited for, the error may come some pages later.
        """
        before = self._words.length
        for some in pages.split(PAGES_AT_ONCE, dim=2):
            words = self._words.room((*some.shape[:3], *self.layout.words_shape), torch.int16, some.device)
            shape = (*some.shape[:3], *self.layout.scales_shape)
            scales = self._scales.room(shape, getattr(torch, self.layout.scale_dtype), some.device)
            quantize_into(some, self.layout, words, scales, self.encoder)
            with torch.inference_mode(False):  # the watch keeps a tensor of its own
                is_bad = self._watch.watch(scales)
            if is_bad:
                self.truncate(before)
                raise QuantizationError(self._complaint(some))

    def truncate(self, pages: int) -> None:
        """Forget all but the first `pages`."""
        self._words.truncate(pages)
        self._scales.truncate(pages)

    def select(self, places: Tensor) -> None:
        """Keep the pages at `places` `[B, H_kv, n]` only, in this order."""
        self._words.select(places)
        self._scales.select(places)

    def exchange(self, archive: Archive, pages: int) -> None:
        """Give all `pages` to an archive, or take them. Raises QuantizationError if a GPU has found them not finite."""
        if self._watch.is_bad(wait=True):
            raise QuantizationError(f"{self.name}: {NOT_FINITE}")
        dtype = getattr(torch, self.layout.scale_dtype)
        archive.buffer("words", self._words, (*archive.rows, pages, *self.layout.words_shape), torch.int16)
        archive.buffer("scales", self._scales, (*archive.rows, pages, *self.layout.scales_shape), dtype)

    def buffers(self) -> Iterator[Buffer]:
        """Yield everything that is stored."""
        yield from (self._words, self._scales)

    def _complaint(self, pages: Tensor) -> str:
        if torch.isfinite(pages).all():
            return (
                f"{self.name}: values up to {pages.abs().max().item():.3g} do not fit {self.layout.scale_dtype} "
                "scales; set `scale_dtype: bfloat16` in the plan's cache section"
            )
        return f"{self.name}: {NOT_FINITE}"


class FullGroup:
    """Pages of a group of key channels that stay in full precision, laid out as quantized ones are.

    Args:
        width: channels.
        reserve: pages to make room for at first.
    """

    def __init__(self, width: int, reserve: int = 0) -> None:
        self.width = width
        self._states = Buffer(reserve)

    @property
    def view(self) -> Plain:
        """Return what is held, without a copy."""
        return Plain(self._states.view)

    def pack(self, pages: Tensor) -> None:
        """Append `[B, H_kv, n, page, width]`."""
        self._states.append(pages.transpose(-1, -2))

    def truncate(self, pages: int) -> None:
        """Forget all but the first `pages`."""
        self._states.truncate(pages)

    def select(self, places: Tensor) -> None:
        """Keep the pages at `places` `[B, H_kv, n]` only, in this order."""
        self._states.select(places)

    def exchange(self, archive: Archive, pages: int) -> None:
        """Give all `pages` to an archive, or take them."""
        archive.buffer("states", self._states, (*archive.rows, pages, self.width, None))

    def buffers(self) -> Iterator[Buffer]:
        """Yield everything that is stored."""
        yield self._states


ChannelGroup = QuantizedGroup | FullGroup
