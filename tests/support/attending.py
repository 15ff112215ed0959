"""Random packed keys and values, and every way to attend to them that this machine has."""

from dataclasses import replace

import torch
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import cpu, naive
from kvmix_kernels.native import library, use_instruction_set
from kvmix_kernels.pages import Channels, Packed, Plain
from kvmix_kernels.quantize import quantize
from kvmix_kernels.segments import Segments
from kvmix_kernels.tiers import EVICTED, Tiers, count

INSTRUCTION_SETS = ["generic", "avx2", "avx512", "vnni"]


def instruction_sets():
    """Those that this machine has, each in use while it is given."""
    for name in INSTRUCTION_SETS:
        if use_instruction_set(name) == name:
            yield name
    use_instruction_set()


def paths():
    """Every way to attend that this machine has, by name; the outputs alone."""
    for name, path in paths_lse():
        yield name, lambda *args, path=path, **kwargs: path(*args, **kwargs)[0]


def paths_lse():
    """Every way to attend that this machine has, by name."""
    yield "naive", naive.attend
    for name in instruction_sets():
        yield name, lambda *args, **kwargs: cpu.attend(library(), *args, **kwargs)


def segments(kind, bits, sinks, pages, tail, head_dim=32, page=16, batch=2, heads=2, group=16, dtype=torch.float32):
    """Random keys or values with poisoned memory around what is theirs."""
    if bits == 16:
        return Segments(None, None, torch.randn(batch, heads, sinks + pages * page + tail, head_dim, dtype=dtype))
    packed = packed_pages(kind, bits, pages, head_dim, page, batch, heads, group) if pages else None
    sink = torch.randn(batch, heads, sinks, head_dim, dtype=dtype) if sinks else None
    return Segments(sink, packed, torch.randn(batch, heads, tail, head_dim, dtype=dtype))


def packed_pages(kind, bits, pages, head_dim=32, page=16, batch=2, heads=2, group=16):
    """Random quantized pages."""
    layout = PageLayout(kind, bits, head_dim, page, group)
    words, scales = quantize(torch.randn(batch, heads, pages, page, head_dim), layout)
    return Packed(layout, poisoned(words, -1), poisoned(scales, float("nan")))


def channel_runs(
    widths, bits, pages, pages_per_order=2, page=16, batch=2, heads=2, group=16, dtype=torch.float32, kind="key"
):
    """Random pages of keys in runs of channels, in a random order."""
    runs = [
        Plain(poisoned(torch.randn(batch, heads, pages, width, page, dtype=dtype), float("nan")))
        if b == 16
        else packed_pages(kind, b, pages, width, page, batch, heads, group)
        for width, b in zip(widths, bits, strict=True)
    ]
    orders = torch.rand(batch, heads, -(-pages // pages_per_order), sum(widths)).argsort(dim=-1)
    return Channels(poisoned(orders.to(torch.uint8), 255), pages_per_order, tuple(runs))


def in_tiers(keys, values, evicted=0):
    """What tiers hold, as tiers of one and the same order; each KV head has its own."""
    sizes = [count(held) for held in keys]
    names = torch.cat([torch.full((n,), i) for i, n in [*enumerate(sizes), (EVICTED, evicted)]]).to(torch.uint8)
    batch, heads = (keys[0].order if isinstance(keys[0], Channels) else _data(keys[0])).shape[:2]
    tier = names[torch.rand(batch, heads, len(names)).argsort(dim=-1)]
    return Tiers(tier, tuple(keys)), Tiers(tier, tuple(values))


def dense(tensor):
    """All tokens in one tensor, zeros where they are gone."""
    tiers = tensor.packed
    if not isinstance(tiers, Tiers):
        return tensor.dequantize()
    gone = int((tiers.tier[0, 0] == EVICTED).sum())
    last = torch.zeros(*tensor.shape[:2], gone, tensor.shape[3])
    tier = tiers.tier.masked_fill(tiers.tier == EVICTED, len(tiers.held))
    return replace(tensor, packed=Tiers(tier, (*tiers.held, last))).dequantize()


def poisoned(x, fill):
    """The same, with memory after every head's that must not be read."""
    if not x.shape[2]:
        return x
    return torch.cat([x, torch.full_like(x[:, :, :1], fill)], dim=2)[:, :, : x.shape[2]]


def relative_rms(got, expected):
    return ((got.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()).item()


def _data(held):
    return held.words if isinstance(held, Packed) else held
