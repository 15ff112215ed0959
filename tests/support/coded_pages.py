"""Keys and values in transform codes with random directions, and poisoned memory around everything that is theirs."""

import torch
from kvmix_kernels.pages import Coded
from kvmix_kernels.segments import Segments
from kvmix_kernels.transform import Frames, TransformBasis, naive
from kvmix_kernels.transform_layout import RUN, TransformLayout
from poisoned import in_a_poisoned_buffer, in_pages


def basis_of(kind, menu, head_dim, page, frame=None, exact=0, seed=0):
    """Directions that are neither orthogonal nor of one size; `menu` has the widths of the quarters of each head."""
    runs = head_dim // 8
    widths = tuple(tuple(int(digits[run * 4 // runs]) for run in range(runs)) for digits in menu)
    draw = torch.Generator().manual_seed(seed)
    heads = len(menu)
    turn = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=draw))[0]
    encoder = turn * torch.randn(heads, head_dim, 1, generator=draw).mul(0.3).exp()
    mean = torch.randn(heads, head_dim, generator=draw) * 0.3
    deviation = encoder.square().sum(-1).sqrt()  # of channels that are independent Gaussians
    frames = None
    if frame is not None:
        frames = Frames(frame, 10.0 ** -torch.linspace(0, 4, head_dim // 4).double(), interleaved=bool(seed % 2))
    layout = TransformLayout(kind, widths, head_dim, page, exact)
    return TransformBasis(layout, encoder, encoder.inverse(), mean, deviation, frames)


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
    """Whole pages of `[B, H_kv, T, D]`, encoded by definition; tokens at `places` `[B, H_kv, N]` are exact."""
    found = naive.encode(in_pages(states, basis.layout.page), basis)
    codes = in_a_poisoned_buffer(found.codes)
    scales = None if found.scales is None else in_a_poisoned_buffer(found.scales)
    if places is None:
        return Coded(basis, codes, scales)
    return Coded(basis, codes, scales, in_a_poisoned_buffer(places), in_a_poisoned_buffer(tokens_at(states, places)))


def tokens_at(states, places):
    """Tokens of `[B, H_kv, T, D]` at `places` `[B, H_kv, N]`; large where these are below 0 and nothing is meant."""
    index = places.long()[..., None].expand(*places.shape, states.shape[3])
    return states.gather(2, index.clamp(min=0)).masked_fill(index < 0, 100.0)


def random_places(batch, heads, pages, page, exact):
    """Places of exact tokens over all pages, ascending, the first of each KV head nothing; None if there are none."""
    if not exact or not pages:
        return None
    places = torch.rand(batch, heads, pages * page).argsort(-1)[..., : exact * pages].int()
    places[..., 0] = -1
    return places.sort().values


def coded_segments(basis, sinks, pages, tail, places=None, batch=2, dtype=torch.float32):
    """Sinks, pages of transform codes and tail."""
    layout = basis.layout
    shape = (batch, layout.kv_heads, sinks + pages * layout.page + tail, layout.head_dim)
    sink, middle, end = torch.randn(shape).to(dtype).split([sinks, pages * layout.page, tail], dim=2)
    held = coded(basis, middle, places) if pages else None
    return Segments(in_a_poisoned_buffer(sink) if sinks else None, held, in_a_poisoned_buffer(end))


def coded_pair(
    menu, sinks, pages, tail, head_dim=64, page=64, frame=None, exact=0, dtype=torch.float32, batch=2, seed=0
):  # fmt: skip
    """The same of keys and of values, which have the menu from the other end."""
    places = random_places(batch, len(menu), pages, page, exact)
    bases = (
        basis_of("key", menu, head_dim, page, frame, exact, seed),
        basis_of("value", menu[::-1], head_dim, page, None, exact, seed),
    )
    return [coded_segments(basis, sinks, pages, tail, places, batch, dtype) for basis in bases]
