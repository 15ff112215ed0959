"""Blocks of transform codes: pages of `kvmix_kernels.transform_layout`, then the scales of values, `[H_kv, page]`.

Exact tokens are chosen among those of whole pages, and blocks have none but the sink: the first tokens of a sequence,
which have codes as well, and behind these room in every block, `[H_kv, sink, D]`, used in a sequence's first one.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..attend.coded import LONGEST_PAGE, pages_of
from ..pages import Coded
from ..runtime.native import library
from ..runtime.native.structs import DTYPES, CSegments
from ..transform import TransformBasis
from ..transform.cpu import code, takes
from ..transform.naive import code as naive_code
from ..transform.naive import pack, project_tokens, states_of, unpack
from ..transform_layout import TOKEN_SCALE_BYTES
from . import cpu, naive
from .base import BlockTensor


class CodedBlocks(BlockTensor):
    """Keys or values as transform codes.

    Args:
        basis: directions, widths and frames; its layout's page is the block.
        sink: first tokens of a sequence that are kept as they are.
        dtype: of these.

    Raises:
        ValueError: if blocks are longer than native attention takes, or shorter than the sink.
    """

    def __init__(self, basis: TransformBasis, sink: int = 0, dtype: torch.dtype = torch.float32) -> None:
        layout = basis.layout
        if sink > layout.page:
            raise ValueError(f"a sink of {sink} tokens is longer than a block of {layout.page}")
        if layout.page > LONGEST_PAGE:
            raise ValueError(f"blocks of transform codes have at most {LONGEST_PAGE} tokens, got {layout.page}")
        self.basis, self.kind, self.kv_heads = basis, layout.kind, layout.kv_heads
        self.head_dim, self.page, self.sink, self.dtype = layout.head_dim, layout.page, sink, dtype
        self._held: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return self._code_bytes + self.kv_heads * self.sink * self.head_dim * self.dtype.itemsize

    @property
    def _code_bytes(self) -> int:
        layout = self.basis.layout
        return layout.page_bytes + (self.kv_heads * self.page * TOKEN_SCALE_BYTES if layout.is_scaled else 0)

    def write(self, blocks: Tensor, states: Tensor, slots: Tensor, positions: Tensor) -> None:
        codes, scales = self._encode(states, positions)
        self._place(self.codes(blocks), codes, slots)
        if scales is not None:
            largest = torch.finfo(scales.dtype).max  # one token that is not finite must not reach others
            room = self.scales(blocks)
            room[slots // self.page, :, slots % self.page] = scales.nan_to_num(0.0, largest, -largest)
        first = positions < self.sink
        if first.any():
            self.sinks(blocks)[slots[first] // self.page, :, positions[first]] = states[first].to(self.dtype)

    def read(self, blocks: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        tokens = self.pages(blocks[table.long()]).select(0, len(table), dtype)[0].flatten(1, 2)
        if self.sink:
            tokens[:, : self.sink] = self.sinks(blocks)[table[0].long()].to(dtype)
        return tokens

    def round_trip(self, states: Tensor, positions: Tensor) -> Tensor:
        codes, scales = self._encode(states, positions)
        pages = codes.transpose(0, 1)[None, :, :, None]
        by_page = None if scales is None else scales.T[None, :, :, None]
        tokens = states_of(pages, by_page, self.basis, self.frames_of(positions), states.dtype)[0, :, :, 0]
        kept = states.to(self.dtype).to(states.dtype)
        return torch.where((positions < self.sink)[:, None, None], kept, tokens.transpose(0, 1))

    def native(self, blocks: Tensor, table: Tensor) -> CSegments:
        call = pages_of(self.pages(blocks))
        call.codes_strides[0] = call.scales_strides[0] = 0  # every sequence has the same blocks
        if self.sink:
            exact = self.first_tokens(blocks, table)
            places = torch.arange(self.sink, dtype=torch.int32)
            self._held = exact, places  # until the next call
            call.places, call.exact, call.exact_strides = places.data_ptr(), exact.data_ptr(), exact.stride()[:3]
            call.exact_tokens, call.exact_dtype = self.sink, DTYPES[exact.dtype]
        return CSegments(coded=ctypes.pointer(call), page=self.page, dim=self.head_dim)

    def _encode(self, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return codes `[n, H_kv, D]` uint8 and scales `[n, H_kv]` of tokens `[n, H_kv, D]`."""
        frames, native = self.frames_of(positions), library()
        if native is not None and takes(states, self.basis):
            return code(native, states, self.basis, frames)
        pages = states.transpose(0, 1)[None, :, :, None]  # of one token each
        codes, scales, _ = naive_code(project_tokens(pages, self.basis, frames), self.basis)
        return codes[0, :, :, 0].transpose(0, 1), None if scales is None else scales[0, :, :, 0].T

    def frames_of(self, positions: Tensor) -> Tensor | None:
        """Return the frame of every token, `[n]`; None where nothing is turned, as in the first frame on a CPU."""
        frames = self.basis.frames
        if frames is None or not frames.turns or frames.length is None:
            return None
        if positions.device.type == "cpu" and not (positions >= frames.length).any():
            return None  # a GPU is not waited for
        return positions // frames.length

    def _place(self, blocks: Tensor, codes: Tensor, slots: Tensor) -> None:
        native = library() if codes.device.type == "cpu" else None
        if native is None:
            naive.place(blocks, codes, slots, self.page, self._unpack, self._pack)
        else:
            layout = cpu.BlockLayout("direction", self.basis.arrays.widths, self.basis.arrays.places, self.page)
            cpu.place(native, layout, blocks, codes, slots)

    def codes(self, blocks: Tensor) -> Tensor:
        """Return the codes of blocks, `[N, page_bytes]`."""
        return blocks[:, : self.basis.layout.page_bytes]

    def scales(self, blocks: Tensor) -> Tensor:
        """Return the scales of blocks of values, `[N, H_kv, page]`."""
        scales = blocks[:, self.basis.layout.page_bytes : self._code_bytes].view(torch.float16)
        by_head: Tensor = scales.unflatten(1, (self.kv_heads, self.page))
        return by_head

    def sinks(self, blocks: Tensor) -> Tensor:
        """Return the first tokens of sequences that begin in blocks, `[N, H_kv, sink, D]`."""
        tokens: Tensor = blocks[:, self._code_bytes :].view(self.dtype).unflatten(1, (self.kv_heads, self.sink, -1))
        return tokens

    def first_tokens(self, blocks: Tensor, table: Tensor) -> Tensor:
        """Return the sink of each sequence of a table `[B, n]`, `[B, H_kv, sink, D]`."""
        return self.sinks(blocks)[table[:, 0].long()].nan_to_num()  # a short sequence has written few of them

    def pages(self, blocks: Tensor) -> Coded:
        """Return blocks as the pages of one sequence."""
        scales = self.scales(blocks).transpose(0, 1)[None] if self.basis.layout.is_scaled else None
        return Coded(self.basis, self.codes(blocks)[None, None], scales)

    def _unpack(self, blocks: Tensor) -> Tensor:
        return unpack(blocks[None, None], self.basis)[0].transpose(0, 1)

    def _pack(self, codes: Tensor) -> Tensor:
        return pack(codes.transpose(0, 1)[None], self.basis)[0, 0]
