"""Tokens into blocks as transform codes, on a GPU: PyTorch's matrix product, and one Triton kernel for the rest.

A program has one token of one KV head. A byte of a plane has codes of several tokens, which other programs write at the
same time, so that bits are put by atomic operations (`store.py`). Sums are in another order than those of a CPU, so a
code at a tie may differ from what a CPU stores.
"""

from __future__ import annotations

import functools
from typing import TypeGuard

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...attend.triton.coded_trial import random_basis
from ...layout import Kind
from ...runtime import trial
from ...runtime.triton_numbers import round_to, to_float32
from ...transform.naive import SMALLEST_SCALE, project_tokens
from ...transform.triton import MOST_DIFFERENT, MOST_DIRECTIONS, bit_planes_of, code_tokens, load_directions
from ..base import BlockTensor
from ..coded import CodedBlocks
from .store import DTYPES, TRIAL_TOKENS, finite, put_bits


@triton.jit(do_not_specialize=["tokens"])
def store_codes_kernel(
    z,
    states,
    states_token,
    states_head,
    words,
    words_block,
    scales,
    scales_block,
    scales_head,
    sinks,
    sinks_block,
    sinks_head,
    slots,
    positions,
    deviation,
    steps,
    levels,
    places,
    shifts,
    tokens,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SINK: tl.constexpr,
    SCALED: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store a token, with arguments that `store` prepares; words are groups of four bytes of codes."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    block, within = slot // PAGE, (slot % PAGE).to(tl.int32)
    direction = tl.arange(0, WIDTH)
    directions = load_directions(deviation, steps, levels, head, HEAD_DIM, WIDTH)
    at = z + (head * tokens + token) * HEAD_DIM + direction
    x = tl.load(at, mask=directions.exists, other=0.0)
    code, scale, _ = code_tokens(x[None, :], directions, SCALED, SMALLEST)
    code = tl.reshape(code.to(tl.int32), [WIDTH])
    words += block * words_block
    for kind in tl.static_range(3):
        of_kind = (head * 3 + kind) * HEAD_DIM + direction
        place = tl.load(places + of_kind, mask=directions.exists, other=-1)
        below = tl.load(shifts + of_kind, mask=directions.exists, other=0)
        put_plane(words, code >> below, place, within, 4 >> kind, PAGE)
    if SCALED:
        kept = finite(scale.to(tl.float32), LARGEST).to(tl.float16)
        tl.store(scales + block * scales_block + head * scales_head + within + tl.arange(0, 1), kept)
    if SINK > 0:
        position = tl.load(positions + token)
        at = states + token * states_token + head * states_head + direction
        state = to_float32(tl.load(at, mask=directions.exists))
        at = sinks + block * sinks_block + head * sinks_head + position * HEAD_DIM + direction
        tl.store(at, round_to(state, sinks.dtype.element_ty), mask=directions.exists & (position < SINK))


@triton.jit
def put_plane(words, code, place, within, BITS: tl.constexpr, PAGE: tl.constexpr):
    """Put a token's lowest `BITS` bits into the planes that begin at bytes `place`; none is there below 0."""
    BYTES: tl.constexpr = PAGE * BITS // 8
    byte = place + within % BYTES
    shift = within // BYTES * BITS + byte % 4 * 8
    put_bits(words + byte // 4, code & ((1 << BITS) - 1), shift, place >= 0, BITS)


def store(tensor: CodedBlocks, blocks: Tensor, states: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Put tokens into blocks, as `CodedBlocks.write` does; arguments are those of it, and `takes` has accepted them."""
    if len(slots) == 0:
        return
    basis, layout = tensor.basis, tensor.basis.layout
    pages = states.transpose(0, 1)[None, :, :, None]  # of one token each
    z = project_tokens(pages, basis, tensor.frames_of(positions)).contiguous()
    words = tensor.codes(blocks).view(torch.int32)
    scales = tensor.scales(blocks) if layout.is_scaled else None
    sinks = tensor.sinks(blocks) if tensor.sink else None
    with torch.cuda.device_of(states):
        store_codes_kernel[(len(slots), layout.kv_heads)](
            z,
            states,
            *states.stride()[:2],
            words,
            words.stride(0),
            scales,
            *((0, 0) if scales is None else scales.stride()[:2]),
            sinks,
            *((0, 0) if sinks is None else sinks.stride()[:2]),
            slots,
            positions,
            basis.deviation.contiguous(),
            basis.steps.contiguous(),
            basis.levels.contiguous(),
            *bit_planes_of(layout, states.device),
            len(slots),
            HEAD_DIM=layout.head_dim,
            PAGE=layout.page,
            SINK=tensor.sink,
            SCALED=layout.is_scaled,
            SMALLEST=SMALLEST_SCALE,
            LARGEST=torch.finfo(torch.float16).max,
            WIDTH=triton.next_power_of_2(layout.head_dim),
            enable_fp_fusion=False,
            num_warps=1,
        )


def takes(tensor: BlockTensor, states: Tensor) -> TypeGuard[CodedBlocks]:
    """Return whether the kernel stores these tokens, and right, as far as a trial can tell; if not, it is named."""
    if not isinstance(tensor, CodedBlocks) or tensor.basis.mean.dtype != torch.float32:
        return False
    if states.dtype not in DTYPES or states.stride(2) != 1 or tensor.head_dim > MOST_DIRECTIONS:
        return False
    kind = tensor.kind, tensor.head_dim, tensor.page, tensor.sink, tensor.dtype
    return not trial.is_due() or passes(states.device, *kind, states.dtype)


@functools.cache
def passes(
    device: torch.device, kind: Kind, head_dim: int, page: int, sink: int, kept: torch.dtype, dtype: torch.dtype
) -> bool:
    """Return whether random tokens are stored as on a CPU, but for ties; if not, one warning names it."""
    name = f"storing {kind}s as codes of {head_dim} directions in blocks of {page} from {dtype}".replace("torch.", "")
    return trial.passes(name, functools.partial(_failure, device, kind, head_dim, page, sink, kept, dtype))


def _failure(
    device: torch.device, kind: Kind, head_dim: int, page: int, sink: int, kept: torch.dtype, dtype: torch.dtype
) -> str | None:
    draw, cpu = torch.Generator(), torch.device("cpu")
    both = []
    for where in (cpu, device):
        basis = random_basis(kind, head_dim, page, where, draw.manual_seed(trial.SEED))
        both.append(CodedBlocks(basis, sink, kept))
    states = torch.randn(TRIAL_TOKENS, both[0].kv_heads, head_dim, generator=draw).to(dtype)
    slots = torch.randperm(2 * page, generator=draw)[:TRIAL_TOKENS]
    positions = torch.randperm(TRIAL_TOKENS, generator=draw) * 20  # in several frames
    expected = torch.randint(256, (2, both[0].nbytes), dtype=torch.uint8, generator=draw)
    found = expected.clone().to(device)
    both[0].write(expected, states, slots, positions)
    store(both[1], found, states.to(device), slots.to(device), positions.to(device))
    return difference(both[0], found.cpu(), expected, slots)


def difference(tensor: CodedBlocks, found: Tensor, expected: Tensor, slots: Tensor) -> str | None:
    """Return what is wrong with blocks `[N, nbytes]` in which tokens were stored at `slots`, or None."""
    wrong = (tensor.codes(found) != tensor.codes(expected)).float().mean().item()
    if wrong > MOST_DIFFERENT:
        return f"{wrong:.2%} of its bytes differ from those of the definition"
    if tensor.basis.layout.is_scaled:
        at = slots // tensor.page, slice(None), slots % tensor.page
        one, right = (tensor.scales(blocks)[at].float() for blocks in (found, expected))
        if not torch.allclose(one, right, rtol=1e-2, atol=1e-2):
            return "its scales differ from those of the definition"
    if tensor.sink and not torch.equal(*(tensor.sinks(blocks).view(torch.uint8) for blocks in (found, expected))):
        return "its sink differs from that of the definition"
    return None
