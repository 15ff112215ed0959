"""Blocks of codes in groups along a token's channels, with a scale and a zero each: of keys, too.

    keys     words   int16  [H_kv, head_dim * bits / 16, page]    one group of channels after the other
             scales         [H_kv, groups, 2, page]
    values   words   int16  [H_kv, page * bits / 16, head_dim]
             scales         [H_kv, 2, groups, page]

Values lie as in a page (`kvmix_kernels.layout`), whose groups run along channels anyway. Keys are the pages of their
groups of channels one after the other, but for the scales, of which every token has its own.
"""

from __future__ import annotations

import ctypes
from functools import cached_property

import torch
from torch import Tensor

from ..layout import SCALE_BYTES, WORD_BITS, Encoder, Kind, PageLayout
from ..quantize.naive import decode, encode, pack, unpack
from ..runtime.native import library
from ..runtime.native.structs import DTYPES, CRun, CSegments
from . import cpu, naive
from .base import BlockTensor


class AffineBlocks(BlockTensor):
    """Keys or values as codes of one width.

    Args:
        kind: `"key"` or `"value"`.
        kv_heads: number of KV heads.
        layout: of a page of *values* with these bits, channels, tokens, groups and scales: groups run along channels.
        encoder: how scales and zeros are chosen.

    Raises:
        ValueError: if groups are no multiple of 16 channels, or the layout is one of keys.
    """

    def __init__(self, kind: Kind, kv_heads: int, layout: PageLayout, encoder: Encoder = "minmax") -> None:
        if layout.kind != "value":
            raise ValueError(f"groups run along channels in blocks: expected a layout of values, got {layout.kind!r}")
        if layout.group % WORD_BITS:
            raise ValueError(f"groups in blocks are multiples of {WORD_BITS} channels, got {layout.group}")
        self.kind, self.kv_heads, self.layout, self.encoder = kind, kv_heads, layout, encoder
        self.head_dim, self.page = layout.head_dim, layout.page
        self._native: tuple[tuple[int, int, int], CSegments] | None = None

    @cached_property
    def nbytes(self) -> int:
        return self._code_bytes + self.kv_heads * self._scales_per_head * SCALE_BYTES[self.layout.scale_dtype]

    @cached_property
    def _code_bytes(self) -> int:
        return self.kv_heads * self.head_dim * self.page * self.layout.bits // 8

    @property
    def _scales_per_head(self) -> int:
        return 2 * self.layout.groups * self.page

    @cached_property
    def groups(self) -> tuple[tuple[int, PageLayout], ...]:
        """The first channel of every group of keys, and the layout of its codes."""
        starts = range(0, self.head_dim, self.layout.group)
        widths = ((start, min(self.layout.group, self.head_dim - start)) for start in starts)
        return tuple((start, PageLayout("key", self.layout.bits, width, self.page)) for start, width in widths)

    @cached_property
    def _code_layout(self) -> cpu.BlockLayout:
        widths = torch.full((self.kv_heads, self.head_dim), self.layout.bits, dtype=torch.uint8)
        places = torch.arange(self.kv_heads) * (self._code_bytes // self.kv_heads)
        return cpu.BlockLayout(self.kind, widths, places, self.page, self.layout.group)

    def write(self, blocks: Tensor, states: Tensor, slots: Tensor, positions: Tensor) -> None:
        is_read = self.encoder == "minmax" and states.dtype in DTYPES and states.stride(2) == 1
        native = library() if is_read and states.device.type == "cpu" else None
        if native is None:
            self.write_plainly(blocks, states, slots)
            return
        codes = blocks[:, : self._code_bytes]
        cpu.store(native, self._code_layout, codes, self.by_token(blocks), states, slots)

    def write_plainly(self, blocks: Tensor, states: Tensor, slots: Tensor) -> None:
        """Store tokens by the definition, `[n, H_kv, D]` in blocks `[N, nbytes]`; see `write`."""
        codes, scales = self._encode(states)
        self._place(blocks[:, : self._code_bytes], codes, slots)
        dtype = getattr(torch, self.layout.scale_dtype)
        largest = torch.finfo(dtype).max  # one token that is not finite must not reach others, not even with weight 0
        room = self.by_token(blocks)
        room[slots // self.page, ..., slots % self.page] = scales.nan_to_num(0.0, largest, -largest).transpose(2, 3)

    def read(self, blocks: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        codes = self._unpack(blocks[table.long(), : self._code_bytes])
        scales = self.scales(blocks)[table.long()]
        scales = scales.transpose(2, 3) if self.kind == "key" else scales  # [pages, H_kv, 2, groups, page]
        return decode(codes, scales, self.layout).transpose(0, 1).flatten(1, 2).to(dtype)

    def round_trip(self, states: Tensor, positions: Tensor) -> Tensor:
        matrix = states.transpose(0, 1)
        codes, scales = encode(matrix, self.layout, self.encoder)
        return decode(codes, scales, self.layout).transpose(0, 1).to(states.dtype)

    def native(self, blocks: Tensor, table: Tensor) -> CSegments:
        place = blocks.data_ptr(), blocks.stride(0), len(blocks)  # an engine's blocks stay where they are
        if self._native is None or self._native[0] != place:
            self._native = place, self._segments(blocks)
        return self._native[1]

    def _segments(self, blocks: Tensor) -> CSegments:
        words, scales = self.words(blocks), self.scales(blocks)
        runs = [(0, self.layout)] if self.kind == "value" else self.groups
        calls = (CRun * len(runs))()
        for index, (start, layout) in enumerate(runs):
            rows = start * self.layout.bits // WORD_BITS
            calls[index] = CRun(
                data=words[:, :, rows:].data_ptr(),
                scales=(scales if self.kind == "value" else scales[:, :, index]).data_ptr(),
                data_strides=(0, words.stride(1), words.stride(0)),
                scales_strides=(0, scales.stride(1), scales.stride(0)),
                bits=layout.bits,
                channels=layout.head_dim,
                group=layout.group,
                dtype=DTYPES[scales.dtype],
                by_token=self.kind == "key",
            )
        runs_at = ctypes.cast(calls, ctypes.POINTER(CRun))
        return CSegments(runs=runs_at, run_count=len(runs), page=self.page, dim=self.head_dim)

    def _encode(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes `[n, H_kv, D]` uint8 and scales `[n, H_kv, 2, groups]` of tokens `[n, H_kv, D]`."""
        codes, scales = encode(states.transpose(0, 1), self.layout, self.encoder)
        return codes.transpose(0, 1), scales.permute(3, 0, 1, 2)

    def _place(self, blocks: Tensor, codes: Tensor, slots: Tensor) -> None:
        native = library() if codes.device.type == "cpu" else None
        if native is None:
            naive.place(blocks, codes, slots, self.page, self._unpack, self._pack)
        else:
            cpu.place(native, self._code_layout, blocks, codes, slots)

    def words(self, blocks: Tensor) -> Tensor:
        """Return the words of blocks, `[N, H_kv, rows * bits / 16, columns]`."""
        columns = self.page if self.kind == "key" else self.head_dim
        words: Tensor = blocks[:, : self._code_bytes].view(torch.int16).unflatten(1, (self.kv_heads, -1, columns))
        return words

    def scales(self, blocks: Tensor) -> Tensor:
        """Return the scales of blocks, `[N, H_kv, groups, 2, page]` of keys, or `[N, H_kv, 2, groups, page]`."""
        axes = (self.layout.groups, 2) if self.kind == "key" else (2, self.layout.groups)
        scales = blocks[:, self._code_bytes :].view(getattr(torch, self.layout.scale_dtype))
        by_head: Tensor = scales.unflatten(1, (self.kv_heads, *axes, self.page))
        return by_head

    def by_token(self, blocks: Tensor) -> Tensor:
        """Return the scales of blocks, of keys or of values, `[N, H_kv, groups, 2, page]`."""
        scales = self.scales(blocks)
        return scales if self.kind == "key" else scales.transpose(2, 3)

    def _unpack(self, blocks: Tensor) -> Tensor:
        """Return the codes `[m, H_kv, page, D]` of contiguous blocks `[m, bytes]`."""
        words = self.words(blocks)
        if self.kind == "value":
            return unpack(words, self.layout).byte()
        rows = words.split([layout.words_shape[0] for _, layout in self.groups], dim=2)
        groups = [unpack(each, layout) for each, (_, layout) in zip(rows, self.groups, strict=True)]
        return torch.cat(groups, dim=2).transpose(2, 3).byte()

    def _pack(self, codes: Tensor) -> Tensor:
        if self.kind == "value":
            return pack(codes, self.layout).flatten(1).view(torch.uint8)
        channels = codes.transpose(2, 3)
        parts = (pack(channels[:, :, start : start + layout.head_dim], layout) for start, layout in self.groups)
        return torch.cat(list(parts), dim=2).flatten(1).view(torch.uint8)
