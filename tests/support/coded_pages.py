"""Keys and values in transform codes with random directions, with poisoned memory around everything that is theirs."""

import torch
from kvmix_kernels.pages import Coded
from kvmix_kernels.segments import Segments
from kvmix_kernels.transform import Frames, TransformBasis, encode
from kvmix_kernels.transform_layout import TransformLayout
from poisoned import in_a_poisoned_buffer, in_pages

MENU = ["6543", "3322", "5510", "6666", "4100", "1111", "0000", "6300"]
"""Widths of quarters of a head."""


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


def coded(states, basis, places=None):
    """Whole pages of `[B, H_kv, T, D]` in transform codes; tokens at `places` `[B, H_kv, N]` are exact."""
    found = encode(in_pages(states, basis.layout.page), basis)
    return Coded(
        basis,
        in_a_poisoned_buffer(found.codes),
        None if found.scales is None else in_a_poisoned_buffer(found.scales),
        places,
        None if places is None else tokens_at(states, places),
    )


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


def coded_segments(
    menu, sinks, pages, tail, head_dim=64, page=64, frame=None, exact=0, dtype=torch.float32, batch=2, seed=0
):  # fmt: skip
    """Sinks, pages of transform codes and tail, of keys and of values; these have the menu from the other end."""
    heads = len(menu)
    places = random_places(batch, heads, pages, page, exact)
    made = []
    for kind, of_kind in (("key", menu), ("value", menu[::-1])):
        states = torch.randn(batch, heads, sinks + pages * page + tail, head_dim).to(dtype)
        basis = basis_of(kind, of_kind, head_dim, page, frame if kind == "key" else None, exact, seed)
        sink, middle, end = states.split([sinks, pages * page, tail], dim=2)
        held = coded(middle, basis, places) if pages else None
        made.append(Segments(in_a_poisoned_buffer(sink) if sinks else None, held, in_a_poisoned_buffer(end)))
    return made
