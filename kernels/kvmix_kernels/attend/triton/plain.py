"""Attention to tokens in full precision, in Triton."""

import triton
import triton.language as tl

from ...runtime.triton_numbers import dot, round_to
from .packed import load
from .softmax import Softmax


@triton.constexpr_function
def padded_channels(channels):
    """Return channels padded to a power of two, at least the 16 that a tensor core contracts at once."""
    return max(16, triton.next_power_of_2(channels))


@triton.jit
def token_products(query, keys, is_token, DIM: tl.constexpr, WHOLE: tl.constexpr):
    """Multiply keys by query rows `[channels, M]`: `[N, M]`.

    Args:
        keys: a pointer to a run of tokens, and the stride from one to the next.
        is_token: `[N]`, whether each of them exists; all of them, if `WHOLE`.
    """
    base, stride = keys
    within, channel = tl.arange(0, is_token.shape[0]), tl.arange(0, padded_channels(DIM))
    inside = is_token[:, None] & (channel < DIM)[None, :]
    keys = load(base + within[:, None] * stride + channel[None, :], inside, WHOLE and channel.shape[0] == DIM)
    products = tl.zeros([is_token.shape[0], query.shape[1]], tl.float32)
    return dot(keys, round_to(query, keys.dtype), products)


@triton.jit
def add_channel_products(products, query, keys, first, CHANNELS: tl.constexpr, PAGE: tl.constexpr):
    """Return `products + keysᵀ @ query` of tokens from `first` on of a page `[CHANNELS, PAGE]`."""
    token, channel = first + tl.arange(0, products.shape[0]), tl.arange(0, query.shape[0])
    is_channel = (channel < CHANNELS)[None, :] & (token >= 0)[:, None]
    keys = load(keys + channel[None, :] * PAGE + token[:, None], is_channel, channel.shape[0] == CHANNELS)
    return dot(keys, round_to(query, keys.dtype), products)


@triton.jit
def add_token_values(
    running, decay, weights, values, firsts, is_token, GROUP: tl.constexpr, DIM: tl.constexpr, WHOLE: tl.constexpr
):
    """Add weighted values of runs of tokens, given as keys above, to the decayed sums.

    Args:
        weights: a tuple of `[N, M]`.
        firsts: the first token of each of them, counted from where `values` begin.
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
            at = base + (token + firsts[i])[None, :] * stride + channel[:, None]
            part = load(at, inside, WHOLE and WIDTH == GROUP and DIM % WIDTH == 0)
            total = dot(part, round_to(weights[i], part.dtype), total)
        sums = sums + (total,)
    return Softmax(running.peak, running.total, sums)
