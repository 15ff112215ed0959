"""Attention on a GPU: chooses how the work is split, and launches two kernels."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from ...layout import PageLayout
from ...segments import Segments
from .kernel import attend_kernel
from .merge import merge_kernel
from .segments import Side
from .softmax import ADDITIVE, BOOLEAN, CAUSAL, LOG2_E

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALLEST_PAGE = 64
MOST_GROUPS = 8
MOST_CHANNELS = 256
TOKENS_PER_SPLIT = 1024
"""At least: a split's partial result is written and read once more."""
PROGRAMS_PER_PROCESSOR = 8
LEAST_ROWS, MOST_ROWS = 8, 32
"""Query rows in a program: 8 is what a tensor core multiplies at once."""
MERGED_AT_ONCE = 16


def unsupported(query: Tensor, key: Segments, value: Segments) -> str | None:
    """What the kernels cannot take of these, for a warning; None if they take all."""
    tensors = (query, key.tail, value.tail)
    if any(x.dtype not in DTYPES or x.stride(3) != 1 for x in tensors):
        return f"{query.dtype} queries over {key.tail.dtype} keys".replace("torch.", "")
    if any(x.shape[3] > MOST_CHANNELS or x.shape[3] % 16 for x in tensors):
        return f"heads of {key.shape[3]} and {value.shape[3]} channels"
    layouts = [tensor.packed.layout for tensor in (key, value) if tensor.packed]
    for layout in layouts:
        if layout.page < SMALLEST_PAGE or not _is_power_of_two(layout.page):
            return f"pages of {layout.page} tokens"
        if layout.groups > MOST_GROUPS or layout.group < 16:
            return f"{layout.kind}s in groups of {layout.group}"
        if layout.kind == "key" and not _is_power_of_two(layout.group):
            return f"keys in groups of {layout.group}"
    if len({layout.page for layout in layouts}) > 1 or any(
        tensor.sinks not in (0, _sinks(key, value)) or (tensor.packed and tensor.sinks != _sinks(key, value))
        for tensor in (key, value)
    ):
        return "keys and values whose pages do not begin at the same tokens"
    return None


def attend(
    query: Tensor,
    key: Segments,
    value: Segments,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`naive.attend` on a GPU; the same arguments and result.

    Nothing waits for the GPU, and what is allocated comes from PyTorch's pool: it can be captured in a CUDA graph.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, tokens, value_dim = key.shape[1], key.shape[2], value.shape[3]
    ratio = heads // kv_heads
    key_layout, value_layout = (tensor.packed.layout if tensor.packed else None for tensor in (key, value))
    page = next((layout.page for layout in (key_layout, value_layout) if layout), SMALLEST_PAGE)
    pages = [tensor.packed.pages if tensor.packed else 0 for tensor in (key, value)]
    is_large = head_dim > 128 or value_dim > 128 or key.tail.dtype == torch.float32
    tile = 32 if is_large else 64
    block = min(MOST_ROWS, max(LEAST_ROWS, triton.next_power_of_2(ratio * queries)))
    blocks = triton.cdiv(ratio * queries, block)

    programs = batch * kv_heads * blocks
    unpacked = tokens - _sinks(key, value) - max(pages) * page
    tiles = triton.cdiv(_sinks(key, value), tile) + triton.cdiv(unpacked, tile)
    packed_splits, pages_per_split = _split(max(pages), page, programs, query.device)
    tile_splits, tiles_per_split = _split(tiles, tile, programs, query.device)
    splits = packed_splits + tile_splits

    rows = (batch * kv_heads, splits, ratio * queries)
    means = torch.empty(*rows, value_dim, dtype=torch.float32, device=query.device)
    logarithms = torch.empty(rows, dtype=torch.float32, device=query.device)
    output = torch.empty(batch, heads, queries, value_dim, dtype=query.dtype, device=query.device)
    kind = _kind(mask, queries)
    per_row = query if mask is None else mask.expand(batch, heads, queries, tokens)
    if per_row.dtype == torch.bool:
        per_row = per_row.view(torch.uint8)
    with torch.cuda.device_of(query):
        attend_kernel[(batch * kv_heads, splits, blocks)](
            query,
            query.stride()[:3],
            _side(key),
            _side(value),
            per_row,
            *per_row.stride(),
            means,
            logarithms,
            scaling * (2 / softcap if softcap else 1) * LOG2_E.value,
            (softcap or 0.0) * LOG2_E.value,
            kv_heads,
            queries,
            tokens,
            _sinks(key, value),
            *pages,
            *(tensor.edges[1] for tensor in (key, value)),
            packed_splits,
            pages_per_split,
            tiles_per_split,
            K=key_layout,
            V=value_layout,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            RATIO=ratio,
            PAGE=page,
            TILE=tile,
            MASK=kind,
            SOFTCAP=softcap is not None,
            BLOCK=block,
            STAGES=2 if is_large else 3,
            num_warps=_warps(block, head_dim, value_dim, key_layout, value_layout),
        )
        merge_kernel[(batch * kv_heads, ratio * queries)](
            output,
            output.stride()[:3],
            means,
            logarithms,
            output if sinks is None else sinks,
            splits,
            kv_heads,
            queries,
            VALUE_DIM=value_dim,
            RATIO=ratio,
            HAS_LOGITS=sinks is not None,
            BLOCK=MERGED_AT_ONCE,
            num_warps=2,
        )
    return output


def _split(units: int, tokens: int, programs: int, device: torch.device) -> tuple[int, int]:
    """In how many splits to cut `units` of `tokens` each, and the units of one: as many as fill the GPU."""
    wanted = PROGRAMS_PER_PROCESSOR * _processors(device)
    each = max(TOKENS_PER_SPLIT // tokens, triton.cdiv(units * programs, wanted), 1)
    return triton.cdiv(units, each), each


def _warps(block: int, head_dim: int, value_dim: int, *runs: PageLayout | int) -> int:
    """As few as the registers allow: two issue the fewest instructions per code (kernels/README.md)."""
    has_wide_codes = any(not isinstance(run, int) and run.bits == 8 for run in runs)
    return 4 if block > LEAST_ROWS or max(head_dim, value_dim) > 128 or has_wide_codes else 2


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _sinks(key: Segments, value: Segments) -> int:
    return max(key.sinks, value.sinks)


def _kind(mask: Tensor | None, queries: int) -> int:
    if mask is None:
        return CAUSAL.value if queries > 1 else 0
    return BOOLEAN.value if mask.dtype == torch.bool else ADDITIVE.value


def _side(tensor: Segments) -> Side:
    """Pointers and strides; what is not there is replaced by the tail."""
    tail = tensor.tail
    sink = tail if tensor.sink is None else tensor.sink
    words, scales = (tensor.packed.words, tensor.packed.scales) if tensor.packed else (tail, tail)
    parts = ((part, part.stride()[:3]) for part in (sink, words, scales, tail))
    return Side(*(field for part in parts for field in part))


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
