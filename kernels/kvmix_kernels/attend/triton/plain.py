"""Attention to tokens in full precision, in Triton."""

import triton
import triton.language as tl

from ...numbers import dot, round_to, to_float32
from .pages import load
from .softmax import Softmax


@triton.jit
def load_rows(rows, factor, DIM: tl.constexpr):
    """The query rows times a factor, `[DIM, M]` in float32, 0 beyond the `DIM` channels up to a power of two."""
    channel = tl.arange(0, triton.next_power_of_2(DIM))
    inside = (channel < DIM)[:, None] & rows.is_row[None, :]
    return to_float32(tl.load(channel[:, None] + rows.pointers[None, :], mask=inside, other=0.0)) * factor


@triton.jit
def token_products(query, keys, is_token, DIM: tl.constexpr, WHOLE: tl.constexpr):
    """Keys times query rows `[channels, M]`: `[N, M]`.

    Args:
        keys: where a run of tokens begins, and the stride from one to the next.
        is_token: `[N]`, which of them there are; all, if it is the `WHOLE`.
    """
    base, stride = keys
    within, channel = tl.arange(0, is_token.shape[0]), tl.arange(0, triton.next_power_of_2(DIM))
    inside = is_token[:, None] & (channel < DIM)[None, :]
    keys = load(base + within[:, None] * stride + channel[None, :], inside, WHOLE and channel.shape[0] == DIM)
    products = tl.zeros([is_token.shape[0], query.shape[1]], tl.float32)
    return dot(keys, round_to(query, keys.dtype), products)


@triton.jit
def add_token_values(
    running, decay, weights, values, is_token, GROUP: tl.constexpr, DIM: tl.constexpr, WHOLE: tl.constexpr
):
    """Weighted values of a run of tokens, as of keys above, added to the decayed sums.

    Args:
        weights: a tuple of `[N, M]`.
        is_token: `[N]`, the same for each of them.
    """
    base, stride = values
    WIDTH: tl.constexpr = triton.next_power_of_2(GROUP)
    N: tl.constexpr = weights[0].shape[0]
    within, token = tl.arange(0, WIDTH), tl.arange(0, N)
    sums = ()
    for group in tl.static_range(len(running.sums)):
        total = running.sums[group] * decay[None, :]
        channel = group * GROUP + within
        inside = ((within < GROUP) & (channel < DIM))[:, None] & is_token[None, :]
        for i in tl.static_range(len(weights)):
            at = base + (token + i * N)[None, :] * stride + channel[:, None]
            part = load(at, inside, WHOLE and WIDTH == GROUP and DIM % WIDTH == 0)
            total = dot(part, round_to(weights[i], part.dtype), total)
        sums = sums + (total,)
    return Softmax(running.peak, running.total, sums)
