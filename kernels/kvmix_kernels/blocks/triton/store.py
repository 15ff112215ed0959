"""Tokens into blocks as codes, each group of channels by its smallest and largest element, on a GPU in Triton.

A program has one token of one KV head. A word of values has codes of several tokens, which other programs write at the
same time, so that bits are cleared and set by atomic operations, each program its own.
"""

from __future__ import annotations

import functools
from typing import TypeGuard

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import Kind, PageLayout
from ...quantize import grids
from ...quantize.triton_grids import codes_of, stored
from ...runtime import trial
from ...runtime.triton_numbers import round_to, to_float32
from ..affine import AffineBlocks
from ..base import BlockTensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRIAL_TOKENS, TRIAL_HEADS = 20, 2


@triton.jit
def store_kernel(
    states,
    states_token,
    states_head,
    words,
    words_block,
    words_head,
    scales,
    scales_block,
    scales_head,
    scales_group,
    scales_part,
    slots,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    IS_KEY: tl.constexpr,
    LARGEST: tl.constexpr,
    TINY_SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store a token, with arguments that `store` prepares; words are pairs of those of `kvmix_kernels.layout`."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    block, within = slot // PAGE, (slot % PAGE).to(tl.int32)
    group, column = tl.arange(0, GROUPS), tl.arange(0, WIDTH)
    channel = group[:, None] * GROUP + column[None, :]
    inside = (column < GROUP)[None, :] & (channel < DIM)
    x = to_float32(tl.load(states + token * states_token + head * states_head + channel, mask=inside, other=0.0))
    is_nan = tl.max((x != x).to(tl.int32), 1) > 0  # which minimum and maximum pass over
    low = tl.min(tl.where(inside, x, float("inf")), 1)
    low = tl.where(is_nan, float("nan"), low + 0.0)  # of 0 and -0 either may be the minimum: make it 0
    high = tl.max(tl.where(inside, x, float("-inf")), 1)
    scale, zero = stored(tl.div_rn(high - low, LEVELS * 1.0), low, scales.dtype.element_ty, TINY_SCALE)
    code = tl.reshape(codes_of(x[None, :, :], scale[None, :], zero[None, :], LEVELS), [GROUPS, WIDTH])
    at = scales + block * scales_block + head * scales_head + group * scales_group + within
    is_group = group * GROUP < DIM
    tl.store(at, round_to(finite(scale, LARGEST), scales.dtype.element_ty), mask=is_group)
    tl.store(at + scales_part, round_to(finite(zero, LARGEST), scales.dtype.element_ty), mask=is_group)
    words += block * words_block + head * words_head
    if BITS == 3:
        put(words, code & 3, channel, within, inside, 0, 2, DIM, GROUP, BITS, PAGE, IS_KEY)
        put(words, code >> 2, channel, within, inside, 2, 1, DIM, GROUP, BITS, PAGE, IS_KEY)
    else:
        put(words, code, channel, within, inside, 0, BITS, DIM, GROUP, BITS, PAGE, IS_KEY)


@triton.jit
def finite(x, LARGEST: tl.constexpr):
    """Return what a token that is not finite leaves: it must not reach others, not even with weight 0."""
    return tl.where(x != x, 0.0, tl.minimum(tl.maximum(x, -LARGEST), LARGEST))


@triton.jit
def put(
    words,
    code,
    channel,
    within,
    inside,
    BELOW: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    IS_KEY: tl.constexpr,
):
    """Put a token's codes into the plane of `WIDTH` bits that has `BELOW` bits of each code before it."""
    if IS_KEY:
        group, row = channel // GROUP, channel % GROUP
        rows = tl.minimum(GROUP, DIM - group * GROUP)
        first = (group * GROUP * BITS + rows * BELOW) // 16 * PAGE + within
    else:
        row, rows = within, PAGE
        first = PAGE * BELOW // 16 * DIM + channel
    COLUMNS: tl.constexpr = PAGE if IS_KEY else DIM
    words_of_column = tl.maximum(rows * WIDTH // 16, 1)  # 0 of channels that do not exist
    index = first + row % words_of_column * COLUMNS
    shift = row // words_of_column * WIDTH + index % 2 * 16
    put_bits(words + index // 2, code, shift, inside, WIDTH)


@triton.jit
def put_bits(words, code, shift, inside, WIDTH: tl.constexpr):
    """Put `WIDTH` bits of codes into words that other programs write at the same time, from bit `shift` on."""
    tl.atomic_and(words, ~(((1 << WIDTH) - 1) << shift), mask=inside)
    tl.atomic_or(words, code << shift, mask=inside)


def store(kind: Kind, layout: PageLayout, words: Tensor, scales: Tensor, states: Tensor, slots: Tensor) -> None:
    """Put tokens into blocks, as `AffineBlocks` defines it.

    Args:
        kind: `"key"` or `"value"`.
        layout: of a page of values with these bits, channels, tokens, groups and scales.
        words: `[N, H_kv, ...]` int16, the words of every block.
        scales: `[N, H_kv, groups, 2, page]`, scale and zero of every block.
        states: `[n, H_kv, D]` float16, bfloat16 or float32, channels contiguous.
        slots: `[n]` int64.
    """
    if len(slots) == 0:
        return
    pairs = words.flatten(2).view(torch.int32)
    with torch.cuda.device_of(states):
        store_kernel[(len(slots), states.shape[1])](
            states,
            *states.stride()[:2],
            pairs,
            *pairs.stride()[:2],
            scales,
            *scales.stride()[:4],
            slots,
            DIM=layout.head_dim,
            GROUP=layout.group,
            BITS=layout.bits,
            PAGE=layout.page,
            IS_KEY=kind == "key",
            LARGEST=torch.finfo(scales.dtype).max,
            TINY_SCALE=grids.TINY_SCALE,
            GROUPS=triton.next_power_of_2(layout.groups),
            WIDTH=triton.next_power_of_2(layout.group),
            enable_fp_fusion=False,
            num_warps=1,
        )


def takes(tensor: BlockTensor, states: Tensor) -> TypeGuard[AffineBlocks]:
    """Return whether the kernel stores these tokens, and right, as far as a trial can tell; if not, it is named."""
    if not isinstance(tensor, AffineBlocks) or tensor.encoder != "minmax":
        return False
    if states.dtype not in DTYPES or states.stride(2) != 1:
        return False
    return not trial.is_due() or passes(states.device, tensor.kind, tensor.layout, states.dtype)


@functools.cache
def passes(device: torch.device, kind: Kind, layout: PageLayout, dtype: torch.dtype) -> bool:
    """Return whether random tokens are stored bit for bit as defined; if not, one warning names it."""
    name = f"storing {kind}s of {layout.bits} bits in groups of {layout.group} from {dtype}".replace("torch.", "")
    return trial.passes(name, functools.partial(_failure, device, kind, layout, dtype))


def _failure(device: torch.device, kind: Kind, layout: PageLayout, dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(trial.SEED)
    tensor = AffineBlocks(kind, TRIAL_HEADS, layout)
    states = torch.randn(TRIAL_TOKENS, TRIAL_HEADS, layout.head_dim, generator=generator).to(dtype)
    slots = torch.randperm(2 * layout.page, generator=generator)[:TRIAL_TOKENS]
    expected = torch.randint(256, (2, tensor.nbytes), dtype=torch.uint8, generator=generator)
    found = expected.clone().to(device)
    tensor.write_plainly(expected, states, slots)
    store(kind, layout, tensor.words(found), tensor.by_token(found), states.to(device), slots.to(device))
    return None if torch.equal(found.cpu(), expected) else "its bytes differ from those of the definition"
