"""Random keys and values for every kernel, with poisoned memory around everything that is theirs."""

import contextlib

import torch
from kvmix_kernels import PageLayout
from kvmix_kernels.attend.triton import sharing
from kvmix_kernels.pages import Channels, Packed, Plain
from kvmix_kernels.pooled import PooledTokens
from kvmix_kernels.quantize.naive import quantize
from kvmix_kernels.segments import Segments
from kvmix_kernels.sorted_tokens import EVICTED, Tiers


@contextlib.contextmanager
def splits_of(tokens):
    """Within, GPU kernels share tokens out in splits of at least so many, and there are many programs."""
    before = sharing.TOKENS_PER_SPLIT, sharing.PROGRAMS_PER_PROCESSOR
    sharing.TOKENS_PER_SPLIT, sharing.PROGRAMS_PER_PROCESSOR = tokens, 1024
    try:
        yield
    finally:
        sharing.TOKENS_PER_SPLIT, sharing.PROGRAMS_PER_PROCESSOR = before


def in_a_poisoned_buffer(x):
    """The same, as a view of a longer buffer along the third axis."""
    poison = torch.nan if x.is_floating_point() else 255 if x.dtype == torch.uint8 else -1
    room = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 2, *x.shape[3:]), poison, dtype=x.dtype)
    room[:, 1:, : x.shape[2]] = x
    return room[:, 1:, : x.shape[2]]


def segments(
    kind, bits, sinks, pages, tail, head_dim=32, page=16, group=16, dtype=torch.float32, scale_dtype="float16", batch=2,
    heads=2,
):  # fmt: skip
    """Sink, pages and tail of keys or values; nothing is packed with 16 bits."""
    shape = (batch, heads, sinks + pages * page + tail, head_dim)
    states = torch.randn(shape).to(dtype)
    if bits == 16:
        return Segments(None, None, in_a_poisoned_buffer(states))
    sink, middle, tail = states.split([sinks, pages * page, tail], dim=2)
    layout = PageLayout(kind, bits, head_dim, page, group, scale_dtype)
    held = packed(middle, layout) if pages else None
    return Segments(in_a_poisoned_buffer(sink) if sinks else None, held, in_a_poisoned_buffer(tail))


def in_pages(states, page):
    """`[B, H_kv, T, D]` as `[B, H_kv, pages, page, D]`."""
    batch, heads, tokens, head_dim = states.shape
    return states.reshape(batch, heads, tokens // page, page, head_dim)


def packed_pages(kind, bits, pages, head_dim=32, page=16, group=16, batch=2, heads=2):
    """Random quantized pages."""
    return packed(torch.randn(batch, heads, pages * page, head_dim), PageLayout(kind, bits, head_dim, page, group))


def packed(states, layout):
    """Whole pages of `[B, H_kv, T, D]`, quantized."""
    words, scales = quantize(in_pages(states, layout.page), layout)
    return Packed(layout, in_a_poisoned_buffer(words), in_a_poisoned_buffer(scales))


def channel_runs(
    widths, bits, pages, pages_per_order=2, page=16, group=16, batch=2, heads=2, dtype=torch.float32, kind="key"
):
    """Random pages, their channels in random orders and cut into runs."""
    states = torch.randn(batch, heads, pages * page, sum(widths)).to(dtype)
    return channels(tuple(zip(widths, bits, strict=True)), states, page, group, pages_per_order, kind)


def channels(runs, states, page, group, pages_per_order=100, kind="key"):
    """Whole pages of `[B, H_kv, T, D]`, their channels in random orders and cut into runs `(width, bits)`."""
    batch, heads, tokens, head_dim = states.shape
    orders = -(-tokens // (page * pages_per_order))
    order = torch.rand(batch, heads, orders, head_dim).argsort(-1)
    of_token = (torch.arange(tokens) // (page * pages_per_order))[None, None, :, None]
    places = states.gather(-1, order.gather(2, of_token.expand(batch, heads, -1, head_dim)))
    made = []
    for part, (width, bits) in zip(places.split([width for width, _ in runs], -1), runs, strict=True):
        if bits == 16:
            made.append(Plain(in_a_poisoned_buffer(in_pages(part, page).transpose(-1, -2))))
        else:
            made.append(packed(part, PageLayout(kind, bits, width, page, group)))
    return Channels(in_a_poisoned_buffer(order.to(torch.uint8)), pages_per_order, tuple(made))


def tiers(counts, gone, batch=2, heads=1):
    """Which tokens are in which tier, `[B, H_kv, T]`: as many as `counts` says in each, and some that are gone."""
    tier = torch.tensor([index for index, count in enumerate(counts) for _ in range(count)] + [EVICTED] * gone)
    return tier[torch.rand(batch, heads, tier.numel()).argsort(-1)].to(torch.uint8)


def pooled(pages, forms, page, dtype=torch.float32):
    """Keys and values of which each KV head has so many pages `[B, H_kv]`, those of different heads mixed in one row.

    Args:
        forms: layout, or None for full precision, and channels of keys and of values.
    """
    batch, heads = pages.shape
    tokens = page * int(pages.max()) + 3  # some are gone from every head
    of_pages = torch.stack([torch.arange(heads).repeat_interleave(row) for row in pages])
    of_pages = of_pages.gather(1, torch.rand(of_pages.shape).argsort(1))[:, None].to(torch.int16)
    ranks = torch.rand(batch, heads, tokens).argsort(-1).argsort(-1)
    tier = torch.where(ranks < page * pages[..., None], 0, EVICTED).to(torch.uint8)
    states = [torch.randn(batch, 1, page * of_pages.shape[2], width).to(dtype) for _, width in forms]
    held = [x if layout is None else packed(x, layout) for x, (layout, _) in zip(states, forms, strict=True)]
    return [PooledTokens(tier, (each,), of_pages, page) for each in held]


def segments_in_tiers(tier, held, sinks, tail, head_dim, dtype):
    """Sink, tokens in tiers, and tail."""
    batch, heads = tier.shape[:2]
    ends = torch.randn(batch, heads, sinks + tail, head_dim).to(dtype).split([sinks, tail], 2)
    sink, tail = (in_a_poisoned_buffer(end) for end in ends)
    return Segments(sink if sinks else None, Tiers(tier, tuple(held)), tail)


def mask_of(kind, queries, tokens, hidden):
    """Causal, and with the first `hidden` tokens of the first batch row hidden, as left padding is."""
    if kind is None:
        return None
    mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries).expand(2, 1, -1, -1).clone()
    mask[0, :, :, :hidden] = False
    return mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
