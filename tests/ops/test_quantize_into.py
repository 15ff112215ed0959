"""Quantizing to where packed pages stay is quantizing, and touches nothing else."""

import pytest
import torch
from kvmix_kernels import BITS, PageLayout
from kvmix_kernels.layout import ENCODERS
from kvmix_kernels.quantize import quantize, quantize_into


def room_for(layout, before, pages, after, lead=(2, 3)):
    """Words and scales of a longer cache, all of them 77."""
    shape = (*lead, before + pages + after)
    words = torch.full((*shape, *layout.words_shape), 77, dtype=torch.int16)
    return words, torch.full((*shape, *layout.scales_shape), 77.0, dtype=torch.float16)


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_same_words_and_scales_and_nothing_else(monkeypatch, encoder, kind, bits, native):
    if native == "0":
        monkeypatch.setattr("kvmix_kernels.quantize.library", lambda: None)
    layout = PageLayout(kind, bits, 32, 16, 16)
    pages = torch.randn(2, 3, 2, 16, 32)
    buffers = room_for(layout, 4, 2, 1)
    quantize_into(pages, layout, *(buffer[:, :, 4:6] for buffer in buffers), encoder)
    for buffer, expected in zip(buffers, quantize(pages, layout, encoder), strict=True):
        assert torch.equal(buffer[:, :, 4:6], expected)
        assert (buffer[:, :, [0, 1, 2, 3, 6]] == 77).all()


def test_a_gpu_writes_them_itself(monkeypatch):
    pytest.importorskip("triton")
    from kvmix_kernels.quantize import triton
    from kvmix_kernels.runtime import gpu

    layout, written = PageLayout("key", 2, 32, 16), []
    monkeypatch.setattr(gpu, "is_usable", lambda device: True)
    monkeypatch.setattr(triton, "is_trusted", lambda *args: True)
    monkeypatch.setattr("kvmix_kernels.quantize.library", lambda: None)
    monkeypatch.setattr(triton, "quantize_into", lambda *args: written.append(args[2:]))
    words, scales = room_for(layout, 1, 2, 0)
    pages = torch.randn(2, 3, 2, 16, 32)
    quantize_into(pages, layout, words[:, :, 1:], scales[:, :, 1:])
    assert written[0][0].data_ptr() == words[:, :, 1:].data_ptr()
    across = words.transpose(-1, -2).contiguous().transpose(-1, -2)
    monkeypatch.setattr(triton, "quantize", lambda *args: quantize_anywhere(*args))
    quantize_into(pages, layout, across[:, :, 1:], scales[:, :, 1:])
    assert len(written) == 1, "pages that are not contiguous are copied"


def quantize_anywhere(pages, layout, encoder):
    from kvmix_kernels.quantize import naive

    return naive.quantize(pages, layout, encoder)


def test_misfits_are_refused():
    layout = PageLayout("key", 2, 32, 16)
    words, scales = room_for(layout, 0, 2, 0)
    pages = torch.randn(2, 3, 2, 16, 32)
    with pytest.raises(ValueError, match=r"expected words \[2, 3, 2, 4, 16\]"):
        quantize_into(pages, layout, words[:, :, :1], scales)
    with pytest.raises(ValueError, match=r"expected scales .* torch.float16, got .* torch.bfloat16"):
        quantize_into(pages, layout, words, scales.bfloat16())
