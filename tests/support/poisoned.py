"""Random keys and values for GPU kernels, with poisoned memory around everything that is theirs."""

import torch
from kvmix_kernels import PageLayout
from kvmix_kernels.pages import Packed
from kvmix_kernels.quantize.naive import quantize
from kvmix_kernels.segments import Segments


def in_a_poisoned_buffer(x):
    """The same, as a view of a longer buffer along the third axis."""
    poison = -1 if x.dtype == torch.int16 else torch.nan
    room = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 2, *x.shape[3:]), poison, dtype=x.dtype)
    room[:, 1:, : x.shape[2]] = x
    return room[:, 1:, : x.shape[2]]


def segments(kind, bits, sinks, pages, tail, head_dim, page, group, dtype, scale_dtype="float16", batch=2, heads=1):
    """Sink, pages and tail of keys or values; nothing is packed with 16 bits."""
    shape = (batch, heads, sinks + pages * page + tail, head_dim)
    states = torch.randn(shape).to(dtype)
    if bits == 16:
        return Segments(None, None, in_a_poisoned_buffer(states))
    sink, middle, tail = states.split([sinks, pages * page, tail], dim=2)
    packed = None
    if pages:
        layout = PageLayout(kind, bits, head_dim, page, group, scale_dtype)
        words, scales = quantize(middle.unflatten(2, (-1, page)), layout)
        packed = Packed(layout, in_a_poisoned_buffer(words), in_a_poisoned_buffer(scales))
    return Segments(in_a_poisoned_buffer(sink) if sinks else None, packed, in_a_poisoned_buffer(tail))


def mask_of(kind, queries, tokens, hidden):
    """Causal, and with the first `hidden` tokens of the first batch row hidden, as left padding is."""
    if kind is None:
        return None
    mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries).expand(2, 1, -1, -1).clone()
    mask[0, :, :, :hidden] = False
    return mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
