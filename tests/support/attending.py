"""Random packed keys and values, and every way to attend to them that this machine has."""

import torch
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import cpu, naive
from kvmix_kernels.native import library, use_instruction_set
from kvmix_kernels.pages import Packed
from kvmix_kernels.quantize import quantize
from kvmix_kernels.segments import Segments

INSTRUCTION_SETS = ["generic", "avx2", "avx512", "vnni"]


def instruction_sets():
    """Those that this machine has, each in use while it is given."""
    for name in INSTRUCTION_SETS:
        if use_instruction_set(name) == name:
            yield name
    use_instruction_set()


def paths():
    """Every way to attend that this machine has, by name."""
    yield "naive", lambda *args, **kwargs: naive.attend(*args, **kwargs)[0]
    for name in instruction_sets():
        yield name, lambda *args, **kwargs: cpu.attend(library(), *args, **kwargs)[0]


def segments(kind, bits, sinks, pages, tail, head_dim=32, page=16, batch=2, heads=2, group=16, dtype=torch.float32):
    """Random keys or values with poisoned memory around what is theirs."""
    layout = PageLayout(kind, bits, head_dim, page, group) if bits != 16 else None
    if layout is None:
        return Segments(None, None, torch.randn(batch, heads, sinks + pages * page + tail, head_dim, dtype=dtype))
    words, scales = quantize(torch.randn(batch, heads, pages, page, head_dim), layout)
    room_words, room_scales = (
        torch.cat([part, torch.full_like(part[:, :, :1], fill)], dim=2) if pages else part
        for part, fill in ((words, -1), (scales, float("nan")))
    )
    packed = Packed(layout, room_words[:, :, :pages], room_scales[:, :, :pages]) if pages else None
    sink = torch.randn(batch, heads, sinks, head_dim, dtype=dtype) if sinks else None
    return Segments(sink, packed, torch.randn(batch, heads, tail, head_dim, dtype=dtype))


def relative_rms(got, expected):
    return ((got.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()).item()
