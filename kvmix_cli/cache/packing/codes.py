"""Whole pages of transform codes, of which a few tokens stay exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kvmix_kernels.pages import Coded
from kvmix_kernels.quantize.finite import FiniteWatch
from kvmix_kernels.transform import TransformBasis, encode
from torch import Tensor

from ...errors import QuantizationError
from ..archive import Archive
from ..buffer import Buffer
from ..tokens.exact import ExactTokens
from .base import Packing
from .groups import NOT_FINITE, PAGES_AT_ONCE


class CodePacking(Packing):
    """Pages of transform codes.

    Args:
        name: of the tensor, for errors, e.g. `layer 3 keys`.
        basis: directions, widths and frames.
        reserve: pages to make room for at first.
        exact: the layer's exact tokens, shared by keys and values; None for none.
    """

    def __init__(self, name: str, basis: TransformBasis, reserve: int = 0, exact: ExactTokens | None = None) -> None:
        self.unit = basis.layout.page
        self._name = name
        self._basis = basis
        self._exact = exact
        self._codes, self._scales = Buffer(reserve), Buffer(reserve)
        self._held: Coded | None = None
        self._watch = FiniteWatch()

    @property
    def tokens(self) -> int:
        return self._codes.length * self.unit

    @property
    def view(self) -> Coded:
        layout, chosen, held = self._basis.layout, self._exact, self._held
        codes, scales = self._codes.view, self._scales.view if layout.is_scaled else None
        places, exact = (None, None) if chosen is None else (chosen.places, chosen.of(layout.kind))
        if held is None or not (
            held.codes is codes and held.scales is scales and held.places is places and held.exact is exact
        ):
            held = self._held = Coded(self._basis, codes, scales, places, exact)
        return held

    def pack(self, states: Tensor) -> None:
        before, errors = self._codes.length, []
        for pages in states.unflatten(2, (-1, self.unit)).split(PAGES_AT_ONCE, dim=2):
            encoded = encode(pages, self._basis, self._codes.length)
            with torch.inference_mode(False):  # the watch keeps a tensor of its own
                is_bad = self._watch.watch(encoded.errors)
            if is_bad:
                self._truncate(before)
                raise QuantizationError(self._complaint(pages))
            self._codes.append(encoded.codes)
            if encoded.scales is not None:
                self._scales.append(encoded.scales)
            errors.append(encoded.errors)
        if self._exact is not None and errors:
            self._exact.add(self._basis.layout.kind, states, torch.cat(errors, dim=2))

    def reopen(self, keep: int, dtype: torch.dtype) -> Tensor:
        first = keep // self.unit
        rest = self.view.read(first * self.unit, keep, dtype)
        self._truncate(first)
        return rest

    def exchange(self, archive: Archive) -> None:
        if self._watch.is_bad(wait=True):
            raise QuantizationError(f"{self._name}: {NOT_FINITE}")
        layout, pages = self._basis.layout, archive.number("pages", self._codes.length)
        archive.buffer("codes", self._codes, (archive.rows[0], 1, pages, layout.page_bytes), torch.uint8)
        if layout.is_scaled:
            archive.buffer("scales", self._scales, (*archive.rows, pages, layout.page), torch.float16)

    def buffers(self) -> Iterator[Buffer]:
        yield from (self._codes, self._scales)

    def _truncate(self, pages: int) -> None:
        for buffer in self.buffers():
            buffer.truncate(pages)

    def _complaint(self, pages: Tensor) -> str:
        if torch.isfinite(pages).all():
            return (
                f"{self._name}: values up to {pages.abs().max().item():.3g} are too far from those that the basis was "
                "made from; profile again, with texts like this one"
            )
        return f"{self._name}: {NOT_FINITE}"
