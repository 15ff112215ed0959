"""Random bases and pages of transform codes, with poisoned memory around what attention reads."""

import torch
from coded_pages import tokens_at
from kvmix_kernels.pages import Coded
from kvmix_kernels.segments import Segments
from kvmix_kernels.transform import Frames, TransformBasis, naive
from kvmix_kernels.transform_layout import RUN, TransformLayout
from poisoned import in_a_poisoned_buffer, in_pages


def random_widths(heads, head_dim, generator):
    """Widths that fall along each head, its own; some heads have runs of 0 bits, and one may have nothing else."""
    runs = -(-head_dim // RUN)
    drawn = torch.randint(0, 7, (heads, runs), generator=generator)
    drawn[torch.rand(heads, runs, generator=generator) < 0.3] = 0
    return tuple(tuple(sorted(head.tolist(), reverse=True)) for head in drawn)


def random_basis(kind, widths, head_dim, page, exact=0, frame=None, interleaved=False, seed=0):
    """Random directions that are not orthogonal; keys are turned to frames of `frame` tokens."""
    generator = torch.Generator().manual_seed(seed)
    heads = len(widths)
    decoder = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=generator))[0]
    decoder = decoder * (0.5 + torch.rand(heads, 1, head_dim, generator=generator))
    deviation = (0.5 + torch.rand(heads, head_dim, generator=generator)).sort(descending=True)[0]
    pairs = head_dim // 4  # RoPE of half the channels, not the first ones
    frequencies = 100.0 ** -(torch.arange(pairs) / pairs).double()
    frames = Frames(frame, frequencies, head_dim - 2 * pairs, interleaved) if kind == "key" else None
    mean = torch.randn(heads, head_dim, generator=generator) / 4
    layout = TransformLayout(kind, widths, head_dim, page, exact)
    return TransformBasis(layout, torch.linalg.inv(decoder).contiguous(), decoder, mean, deviation, frames)


def coded(basis, states, places=None):
    """Whole pages of `[B, H_kv, T, D]`, encoded by definition; tokens at `places` are exact."""
    encoded = naive.encode(in_pages(states, basis.layout.page), basis)
    scales = None if encoded.scales is None else in_a_poisoned_buffer(encoded.scales)
    if places is None:
        return Coded(basis, encoded.codes, scales)
    exact = in_a_poisoned_buffer(tokens_at(states, places))
    return Coded(basis, encoded.codes, scales, in_a_poisoned_buffer(places), exact)


def coded_segments(basis, sinks, pages, tail, places=None, batch=2, dtype=torch.float32):
    """Sink, coded pages and tail."""
    layout = basis.layout
    shape = (batch, layout.kv_heads, sinks + pages * layout.page + tail, layout.head_dim)
    sink, middle, last = torch.randn(shape).to(dtype).split([sinks, pages * layout.page, tail], dim=2)
    held = coded(basis, middle, places) if pages else None
    return Segments(in_a_poisoned_buffer(sink) if sinks else None, held, in_a_poisoned_buffer(last))
