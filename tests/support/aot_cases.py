"""The kernels that are compiled ahead of time, as decoding launches them: pages of 128 tokens, one KV head."""

import torch
from aot import LANES, ahead_of_time
from kvmix_kernels import PageLayout
from kvmix_kernels.attend.triton import attend
from kvmix_kernels.pages import Packed
from kvmix_kernels.quantize import triton as quantizing
from kvmix_kernels.segments import Segments

PAGE, PAGES = 128, 2


def segments(kind, bits, head_dim, group, pages=PAGES, tail=16):
    """Pages and a tail of one KV head; zeros."""
    if bits == 16:
        return Segments(None, None, torch.zeros(1, 1, pages * PAGE + tail, head_dim, dtype=torch.bfloat16))
    layout = PageLayout(kind, bits, head_dim, PAGE, group)
    words = torch.zeros(1, 1, pages, *layout.words_shape, dtype=torch.int16)
    scales = torch.zeros(1, 1, pages, *layout.scales_shape, dtype=torch.float16)
    return Segments(None, Packed(layout, words, scales), torch.zeros(1, 1, tail, head_dim, dtype=torch.bfloat16))


def compile_attend(capability, k_bits, v_bits, *, group=None, head_dim=128, queries=1, ratio=4):
    """The attention kernel and the merging one, compiled."""
    query = torch.zeros(1, ratio, queries, head_dim, dtype=torch.bfloat16)
    key, value = segments("key", k_bits, head_dim, group), segments("value", v_bits, head_dim, group)
    with ahead_of_time(capability) as compiled:
        attend(query, key, value, scaling=0.1)
    return compiled


def compile_quantize(capability, kind, bits, *, head_dim=128, group=None):
    """The quantizing kernel, compiled."""
    with ahead_of_time(capability) as compiled:
        pages = torch.zeros(1, 1, PAGES, PAGE, head_dim, dtype=torch.bfloat16)
        quantizing.quantize(pages, PageLayout(kind, bits, head_dim, PAGE, group))
    return compiled[0]


def main_loop(kernel):
    """Instructions of the loop over packed pages: the first that multiplies matrices."""
    return next(loop for loop in kernel.loops() if loop["HMMA"] or loop["HGMMA"])


def lane_instructions_per_code(kernel, head_dim=128):
    """What the loop over packed pages issues, by the lane, for each code of keys and values."""
    return sum(main_loop(kernel).values()) * LANES * kernel.warps / (2 * PAGE * head_dim)
