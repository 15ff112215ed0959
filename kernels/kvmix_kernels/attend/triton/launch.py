"""Attention on a GPU: launches a kernel for each part of the tokens, and one that puts them all together."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...layout import PageLayout
from ...pages import Channels, Packed
from ...segments import Segments
from ..parts import Part, parts_of
from .channels import Runs
from .kernel import attend_kernel
from .limits import runs_of
from .merge import merge_kernel
from .segments import Run, Side
from .shares import Shares, shares_of
from .softmax import ADDITIVE, BOOLEAN, CAUSAL, LOG2_E

LEAST_ROWS, MOST_ROWS = 8, 32
"""Query rows in a program: 8 is what a tensor core multiplies at once."""
MERGED_AT_ONCE = 16


def attend(
    query: Tensor,
    key: Segments,
    value: Segments,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive.attend` on a GPU; the same arguments and results.

    Nothing waits for the GPU, and what is allocated comes from PyTorch's pool: it can be captured in a CUDA graph.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, value_dim, ratio = key.shape[1], value.shape[3], heads // key.shape[1]
    block = min(MOST_ROWS, max(LEAST_ROWS, triton.next_power_of_2(ratio * queries)))
    blocks = triton.cdiv(ratio * queries, block)
    is_large = head_dim > 128 or value_dim > 128 or key.tail.dtype == torch.float32
    parts = parts_of(query, key, value, mask)
    shares = [shares_of(part.key, part.value, 32 if is_large else 64, batch * kv_heads * blocks) for part in parts]
    splits = sum(share.splits for share in shares)

    rows = (batch * kv_heads, splits, ratio * queries)
    means = torch.empty(*rows, value_dim, dtype=torch.float32, device=query.device)
    logarithms = torch.empty(rows, dtype=torch.float32, device=query.device)
    output = torch.empty(batch, heads, queries, value_dim, dtype=query.dtype, device=query.device)
    totals = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        first_split = 0
        for part, share in zip(parts, shares, strict=True):
            if share.splits:
                _launch(query, part, share, means, logarithms, first_split, scaling, softcap, block, is_large)
            first_split += share.splits
        merge_kernel[(batch * kv_heads, ratio * queries)](
            output,
            output.stride()[:3],
            totals,
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
    return output, totals


def _launch(
    query: Tensor,
    part: Part,
    shares: Shares,
    means: Tensor,
    logarithms: Tensor,
    first_split: int,
    scaling: float,
    softcap: float | None,
    block: int,
    is_large: bool,
) -> None:
    """Attend to a part of the tokens, whose splits are those from `first_split` on of all."""
    key, value, mask = part
    batch, heads, queries, head_dim = query.shape
    kv_heads, tokens, value_dim, ratio = key.shape[1], key.shape[2], value.shape[3], heads // key.shape[1]
    per_row = query if mask is None else mask.expand(batch, heads, queries, tokens)
    if per_row.dtype == torch.bool:
        per_row = per_row.view(torch.uint8)
    runs, value_layout = _runs(key), next(iter(_runs(value)), None)
    attend_kernel[(batch * kv_heads, shares.splits, triton.cdiv(ratio * queries, block))](
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
        shares.sinks,
        *shares.pages,
        key.packed.pages_per_order if isinstance(key.packed, Channels) else 1,
        *(tensor.edges[1] for tensor in (key, value)),
        first_split,
        means.shape[1],
        shares.packed_splits,
        shares.pages_per_split,
        shares.tiles_per_split,
        K=Runs(runs) if runs else None,
        V=value_layout,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        RATIO=ratio,
        PAGE=shares.page,
        TILE=shares.tile,
        MASK=_kind(mask, queries),
        SOFTCAP=softcap is not None,
        BLOCK=block,
        STAGES=2 if is_large else 3,
        num_warps=_warps(block, max(head_dim, value_dim), (*runs, value_layout)),
    )


def _warps(block: int, channels: int, runs: tuple[PageLayout | int | None, ...]) -> int:
    """As few as the registers allow: two issue the fewest instructions per code (kernels/README.md)."""
    has_wide_codes = any(isinstance(run, PageLayout) and run.bits == 8 for run in runs)
    return 4 if block > LEAST_ROWS or channels > 128 or has_wide_codes else 2


def _kind(mask: Tensor | None, queries: int) -> int:
    if mask is None:
        return CAUSAL.value if queries > 1 else 0
    return BOOLEAN.value if mask.dtype == torch.bool else ADDITIVE.value


def _runs(tensor: Segments) -> tuple[PageLayout | int, ...]:
    """What is packed: layouts, and numbers of channels in full precision."""
    return tuple(run.layout if isinstance(run, Packed) else run.width for run in runs_of(tensor.packed))


def _side(tensor: Segments) -> Side:
    """Pointers and strides."""
    sink = tensor.tail if tensor.sink is None else tensor.sink
    order = (tensor.packed.order,) if isinstance(tensor.packed, Channels) else ()
    runs = []
    for run in runs_of(tensor.packed):
        parts = (run.words, run.scales) if isinstance(run, Packed) else (run.states, run.states)
        runs.append(Run(*(field for part in parts for field in (part, part.stride()[:3]))))
    return Side(
        sink,
        sink.stride()[:3],
        tuple(runs),
        order,
        tuple(stride for each in order for stride in each.stride()[:3]),
        tensor.tail,
        tensor.tail.stride()[:3],
    )
