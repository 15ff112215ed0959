"""Random packed keys and values, and every way to attend to them that this machine has."""

import functools
import os
from dataclasses import replace

import torch
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import cpu, naive
from kvmix_kernels.quantize import quantize
from kvmix_kernels.runtime.native import library, use_instruction_set
from kvmix_kernels.segments import EVICTED, Channels, Packed, Plain, Segments, Tiers, count

INSTRUCTION_SETS = ["generic", "avx2", "avx512", "vnni"]


def instruction_sets():
    """Those that this machine has, at most the one that `KVMIX_ISA` asks for, each in use while it is given."""
    most = os.environ.get("KVMIX_ISA") or INSTRUCTION_SETS[-1]
    for name in INSTRUCTION_SETS[: INSTRUCTION_SETS.index(most) + 1]:
        if use_instruction_set(name) == name:
            yield name
    use_instruction_set()


def paths():
    """Every way to attend that this machine has, by name."""
    yield "naive", naive.attend
    for name in instruction_sets():
        yield name, functools.partial(cpu.attend, library())


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


def in_tiers(keys, values, gone=0):
    """What tiers hold, in an order of tokens that each KV head has to itself; `gone` tokens are evicted."""
    batch, heads = (keys[0] if isinstance(keys[0], torch.Tensor) else keys[0].read(0, 0, torch.float32)).shape[:2]
    names = [torch.full((n,), tier) for tier, n in [*enumerate(map(count, keys)), (EVICTED, gone)]]
    tier = torch.cat(names).to(torch.uint8).expand(batch, heads, -1)
    tier = tier.gather(2, torch.rand(tier.shape).argsort(dim=-1))
    return Tiers(tier, tuple(keys)), Tiers(tier, tuple(values))


def dense(tensor):
    """All tokens in one float64 tensor, zeros where they are gone."""
    if isinstance(tensor.packed, Tiers):
        tier, held = tensor.packed.tier, tensor.packed.held
        nothing = tensor.tail.new_zeros(*tensor.shape[:2], tensor.packed.tokens - tensor.packed.kept, tensor.shape[3])
        tensor = replace(tensor, packed=Tiers(tier.masked_fill(tier == EVICTED, len(held)), (*held, nothing)))
    return tensor.read(0, tensor.shape[2], torch.float64)


def seen(query, key, mask):
    """Which tokens may be seen, `[B, H, S, T]`, by the mask (additive: by what it adds) and by not being gone."""
    tokens, queries = key.shape[2], query.shape[2]
    if mask is None:
        mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    if not isinstance(key.packed, Tiers):
        return mask
    first, last = key.edges
    gone = torch.zeros(key.shape[:3], dtype=torch.bool)
    gone[:, :, first:last] = key.packed.tier == EVICTED
    gone = gone.repeat_interleave(query.shape[1] // key.shape[1], dim=1)[:, :, None]
    if mask.dtype == torch.bool:
        return mask & ~gone
    return mask.expand(*query.shape[:3], tokens).masked_fill(gone, -torch.inf)


def poisoned(x, fill):
    """The same, with memory after every head's that must not be read."""
    if not x.shape[2]:
        return x
    return torch.cat([x, torch.full_like(x[:, :, :1], fill)], dim=2)[:, :, : x.shape[2]]


def relative_rms(got, expected):
    return ((got.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()).item()


def same_bits(one, other):
    """Whether two tensors of 16-bit numbers are the same, NaN included."""
    return one.shape == other.shape and torch.equal(one.view(torch.int16), other.view(torch.int16))
