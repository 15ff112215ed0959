"""The kernels that are compiled ahead of time, as decoding launches them: one KV head, two pages and a tail."""

import torch
from aot import LANES, ahead_of_time
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import AttentionProblem
from kvmix_kernels.attend.triton import attend
from kvmix_kernels.attend.triton.planes import CHUNK, PLANE_BITS
from kvmix_kernels.blocks import AffineBlocks, BlockLayer, CodedBlocks, PlainBlocks
from kvmix_kernels.blocks.problem import BlockProblem
from kvmix_kernels.blocks.triton import attend as attend_blocks
from kvmix_kernels.blocks.triton import coded_store
from kvmix_kernels.blocks.triton.store import store
from kvmix_kernels.pages import Channels, Coded, Packed, Plain
from kvmix_kernels.quantize import triton as quantizing
from kvmix_kernels.segments import Segments
from kvmix_kernels.transform import TransformBasis
from kvmix_kernels.transform import triton as transforming
from kvmix_kernels.transform_layout import RUN, TransformLayout

PAGE, PAGES = 128, 2
RUNS = {
    "16, 4 and 2": ((16, 16), (32, 4), (80, 2)),
    "4 and 2": ((32, 4), (96, 2)),
    "3 and 8": ((112, 3), (16, 8)),
}
"""Keys of 128 channels cut into runs: `(channels, bits)`."""


def segments(kind, bits, head_dim, group, pages=PAGES, tail=16, page=PAGE):
    """Pages and a tail of one KV head; zeros. `bits` of keys may be runs."""
    if bits == 16:
        return Segments(None, None, torch.zeros(1, 1, pages * page + tail, head_dim, dtype=torch.bfloat16))
    runs = [(head_dim, bits)] if isinstance(bits, int) else bits
    made = tuple(run(kind, *each, group, pages, page) for each in runs)
    order = torch.arange(head_dim, dtype=torch.uint8).view(1, 1, 1, -1)
    packed = made[0] if isinstance(bits, int) else Channels(order, 1000, made)
    return Segments(None, packed, torch.zeros(1, 1, tail, head_dim, dtype=torch.bfloat16))


def run(kind, channels, bits, group, pages, page):
    """Pages of some channels."""
    if bits == 16:
        return Plain(torch.zeros(1, 1, pages, channels, page, dtype=torch.bfloat16))
    layout = PageLayout(kind, bits, channels, page, group)
    words = torch.zeros(1, 1, pages, *layout.words_shape, dtype=torch.int16)
    return Packed(layout, words, torch.zeros(1, 1, pages, *layout.scales_shape, dtype=torch.float16))


def coded(kind, head_dim, pages=PAGES, tail=16, page=PAGE, exact=8):
    """Pages of transform codes of one KV head, its planes of every kind, and a tail; zeros."""
    widths = tuple(max(0, 6 - 7 * run // (head_dim // RUN)) for run in range(head_dim // RUN))
    layout = TransformLayout(kind, (widths,), head_dim, page, 1)
    matrix, vector = torch.eye(head_dim).expand(1, -1, -1), torch.ones(1, head_dim)
    basis = TransformBasis(layout, matrix, matrix, vector, vector)
    codes = torch.zeros(1, 1, pages, layout.page_bytes, dtype=torch.uint8)
    scales = torch.zeros(1, 1, pages, page, dtype=torch.float16) if kind == "value" else None
    states = torch.zeros(1, 1, max(exact, tail), head_dim, dtype=torch.bfloat16)
    places = torch.arange(exact, dtype=torch.int32).expand(1, 1, -1) if exact else None
    held = Coded(basis, codes, scales, places, states[:, :, :exact] if exact else None)
    return Segments(None, held, states[:, :, :tail])


def compile_attend(capability, k_bits, v_bits, *, group=None, head_dim=128, queries=1, ratio=4, page=PAGE):
    """The attention kernel and the merging one, compiled."""
    query = torch.zeros(1, ratio, queries, head_dim, dtype=torch.bfloat16)
    key = segments("key", k_bits, head_dim, group, page=page)
    value = segments("value", v_bits, head_dim, group, page=page)
    with ahead_of_time(capability) as compiled:
        attend(AttentionProblem(query, key, value, scaling=0.1))
    return compiled


def compile_quantize(capability, kind, bits, *, head_dim=128, group=None, encoder="minmax"):
    """The quantizing kernel, compiled."""
    with ahead_of_time(capability) as compiled:
        pages = torch.zeros(1, 1, PAGES, PAGE, head_dim, dtype=torch.bfloat16)
        quantizing.quantize(pages, PageLayout(kind, bits, head_dim, PAGE, group), encoder)
    return compiled[0]


def compile_coded(capability, *, head_dim=128, queries=1, ratio=4, page=PAGE, exact=8):
    """The attention kernel for transform codes, compiled."""
    query = torch.zeros(1, ratio, queries, head_dim, dtype=torch.bfloat16)
    key, value = (coded(kind, head_dim, page=page, exact=exact) for kind in ("key", "value"))
    with ahead_of_time(capability) as compiled:
        attend(AttentionProblem(query, key, value, scaling=0.1))
    return next(each for each in compiled if each.name == "coded_kernel")


def compile_encode(capability, kind, *, head_dim=128, page=PAGE):
    """The kernel that makes transform codes, compiled."""
    basis = coded(kind, head_dim, page=page).packed.basis
    with ahead_of_time(capability) as compiled:
        transforming.encode(torch.zeros(1, 1, PAGES, page, head_dim, dtype=torch.bfloat16), basis)
    return compiled[0]


def plane_loops(kernel):
    """Instructions of the loops over chunks of planes of 4, 2 and 1 bits: of keys, then of values."""
    loops = [loop for loop in kernel.loops() if loop["HMMA"] and loop["BRA"] == 1]  # others have loops in them
    assert len(loops) == 2 * len(PLANE_BITS)
    return {(kind, bits): loops.pop(0) for kind in ("key", "value") for bits in PLANE_BITS}


def lane_instructions_per_plane_code(kernel, loop, page=PAGE):
    """What a loop over chunks of planes issues, by the lane, for each code of a plane."""
    return sum(loop.values()) * LANES * kernel.warps / (page * CHUNK)


def main_loop(kernel):
    """Instructions of the loop over packed pages: the first that multiplies matrices."""
    return next(loop for loop in kernel.loops() if loop["HMMA"] or loop["HGMMA"])


def lane_instructions_per_code(kernel, head_dim=128, tokens=PAGE):
    """What the loop over packed pages issues, by the lane, for each code of keys and values of so many tokens."""
    return sum(main_loop(kernel).values()) * LANES * kernel.warps / (2 * tokens * head_dim)


def compile_blocks(capability, k_bits, v_bits, *, group=None, head_dim=128, ratio=4, page=PAGE):
    """The kernel for attention over an engine's blocks, compiled: one sequence that decodes."""
    tensors = (in_blocks(kind, bits, group, head_dim, page) for kind, bits in (("key", k_bits), ("value", v_bits)))
    return compiled_over_blocks(capability, BlockLayer(*tensors), head_dim, ratio, page)


def compile_coded_blocks(capability, *, head_dim=128, ratio=4, page=PAGE, sink=1):
    """The kernel for attention over blocks of transform codes, compiled: one sequence that decodes."""
    tensors = (coded_in_blocks(kind, head_dim, page, sink) for kind in ("key", "value"))
    compiled = compiled_over_blocks(capability, BlockLayer(*tensors), head_dim, ratio, page)
    return next(each for each in compiled if each.name == "coded_kernel")


def compiled_over_blocks(capability, layer, head_dim, ratio, page):
    """What attention over one sequence's blocks compiles."""
    blocks, table = torch.zeros(PAGES, layer.nbytes, dtype=torch.uint8), torch.arange(PAGES, dtype=torch.int32)[None]
    query = torch.zeros(1, ratio, 1, head_dim, dtype=torch.bfloat16)
    lengths = torch.tensor([PAGES * page])
    with ahead_of_time(capability) as compiled:
        attend_blocks(BlockProblem(query, layer.keys, layer.values, *layer.parts(blocks), table, lengths, 0.1))
    return compiled


def compile_store(capability, kind, bits, *, group=None, head_dim=128, page=PAGE):
    """The kernel that stores tokens in an engine's blocks, compiled."""
    tensor, states = in_blocks(kind, bits, group, head_dim, page), torch.zeros(4, 1, head_dim, dtype=torch.bfloat16)
    blocks = torch.zeros(PAGES, tensor.nbytes, dtype=torch.uint8)
    with ahead_of_time(capability) as compiled:
        store(kind, tensor.layout, tensor.words(blocks), tensor.by_token(blocks), states, torch.arange(4))
    return compiled[0]


def in_blocks(kind, bits, group, head_dim, page):
    """Keys or values of one KV head in blocks."""
    if bits == 16:
        return PlainBlocks(kind, 1, head_dim, page, torch.bfloat16)
    return AffineBlocks(kind, 1, PageLayout("value", bits, head_dim, page, group))


def compile_coded_store(capability, kind, *, head_dim=128, page=PAGE, sink=1):
    """The kernel that stores tokens as transform codes in an engine's blocks, compiled."""
    tensor, states = coded_in_blocks(kind, head_dim, page, sink), torch.zeros(4, 1, head_dim, dtype=torch.bfloat16)
    blocks = torch.zeros(PAGES, tensor.nbytes, dtype=torch.uint8)
    with ahead_of_time(capability) as compiled:
        coded_store.store(tensor, blocks, states, torch.arange(4), torch.arange(4))
    return compiled[0]


def coded_in_blocks(kind, head_dim, page, sink):
    """Keys or values of one KV head as transform codes in blocks."""
    return CodedBlocks(coded(kind, head_dim, page=page).packed.basis, sink, torch.bfloat16)
