"""GPU kernels are tried before they are used: what passes is taken, what is wrong or fails is named once and left."""

import pytest
import torch
from attending import segments

pytest.importorskip("triton")
from kvmix_kernels import PageLayout, gpu, trial
from kvmix_kernels.attend import attend, naive
from kvmix_kernels.attend.triton import trial as attending
from kvmix_kernels.fallback import warn_once
from kvmix_kernels.quantize import naive as codec
from kvmix_kernels.quantize import quantize
from kvmix_kernels.quantize import trial as quantizing
from kvmix_kernels.quantize import triton as quantizing_kernel

CPU = torch.device("cpu")
CACHED = (attending.passes, quantizing.passes, gpu.is_usable, warn_once)
LAYOUT = PageLayout("key", 2, 64, 64, 32)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """A GPU that is not here, whose kernels are right; and what they were asked for."""
    asked = []

    def right(name, definition):
        return lambda *args, **options: asked.append(name) or definition(*args, **options)

    for cached in CACHED:
        cached.cache_clear()
    monkeypatch.delenv("KVMIX_TRITON", raising=False)
    monkeypatch.setattr(attending, "attend", right("attend", naive.attend))
    monkeypatch.setattr(quantizing_kernel, "quantize", right("quantize", codec.quantize))
    yield asked
    for cached in CACHED:
        cached.cache_clear()


@pytest.fixture
def device(monkeypatch):
    """Where the ops believe that there are kernels."""
    monkeypatch.setattr(gpu, "is_usable", lambda device: True)
    monkeypatch.setattr("kvmix_kernels.quantize.library", lambda: None)
    monkeypatch.setattr("kvmix_kernels.attend.triton.attend", naive.attend)


def half_as_much(*args, **options):
    output, logarithms = naive.attend(*args, **options)
    return output / 2, logarithms


def other_logarithms(*args, **options):
    output, logarithms = naive.attend(*args, **options)
    return output, logarithms + 1


def not_a_number(*args, **options):
    output, logarithms = naive.attend(*args, **options)
    return output * torch.nan, logarithms


def breaks(*args, **options):
    raise RuntimeError("no such instruction\nin a long log")


def one_bit_off(pages, layout):
    words, scales = codec.quantize(pages, layout)
    words.view(-1)[7] ^= 1
    return words, scales


def problem(bits=2):
    return torch.randn(2, 4, 1, 64), *(segments(kind, bits, 0, 1, 5, 64, 64, group=32) for kind in ("key", "value"))


def test_right_kernels_are_usable_after_a_handful_of_trials(kernels, monkeypatch, recwarn):
    monkeypatch.setattr(gpu, "_missing", lambda device: None)
    monkeypatch.setattr(attending, "first_kinds", lambda device, real=attending.first_kinds: real(CPU))
    monkeypatch.setattr(quantizing, "passes", lambda device, *rest, real=quantizing.passes: real(CPU, *rest))
    assert gpu.is_usable(torch.device("cuda"))
    assert gpu.is_usable(torch.device("cuda"))
    assert kernels == ["quantize", "quantize", "attend", "attend"]
    assert not recwarn.list


@pytest.mark.parametrize("setting", ["0", "1"])
def test_the_environment_decides_without_trials(kernels, monkeypatch, setting):
    monkeypatch.setattr(gpu, "_missing", lambda device: None)
    monkeypatch.setenv("KVMIX_TRITON", setting)
    assert gpu.is_usable(torch.device("cuda")) == (setting == "1")
    assert kernels == []


def test_kernels_that_are_taken_as_they_are_are_not_tried(kernels, device, monkeypatch):
    monkeypatch.setenv("KVMIX_TRITON", "1")
    query, key, value = problem()
    kernels.clear()
    attend(query, key, value, scaling=0.125)
    assert quantizing.is_trusted(CPU, LAYOUT, torch.float32)
    assert kernels == []


def test_a_gpu_on_which_one_is_wrong_has_none(monkeypatch):
    monkeypatch.setattr(gpu, "_missing", lambda device: None)
    monkeypatch.setattr(quantizing, "first_layouts", list)
    monkeypatch.setattr(attending, "first_kinds", lambda device, real=attending.first_kinds: real(CPU))
    monkeypatch.setattr(attending, "attend", half_as_much)
    with pytest.warns(UserWarning, match=r"attention over K2 V4 \(4 query heads .* fails its trial") as warned:
        assert not gpu.is_usable(torch.device("cuda"))
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        (half_as_much, r"relative RMS error 0\.5"),
        (other_logarithms, "relative RMS error"),
        (not_a_number, "relative RMS error nan"),
        (breaks, "RuntimeError: no such instruction$"),
    ],
)
def test_a_wrong_kind_of_attention_is_named_once_and_left_to_pytorch(monkeypatch, device, kernel, complaint):
    monkeypatch.setattr(attending, "attend", kernel)
    monkeypatch.setattr("kvmix_kernels.attend.triton.attend", breaks)
    query, key, value = problem()
    with pytest.warns(UserWarning, match=f"attention over K2 V2 .* fails its trial.*{complaint}") as warned:
        for _ in range(2):
            got = attend(query, key, value, scaling=0.125)
    assert len(warned) == 1
    torch.testing.assert_close(got, naive.attend(query, key, value, scaling=0.125)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [(one_bit_off, "other words than the definition's"), (breaks, "RuntimeError: no such instruction$")],
)
def test_a_wrong_codec_is_named_once_and_left_to_pytorch(monkeypatch, device, kernel, complaint):
    monkeypatch.setattr(quantizing_kernel, "quantize", kernel)
    pages = torch.randn(1, 1, 1, 64, 64)
    with pytest.warns(UserWarning, match=f"quantizing keys to 2 bits in groups of 32 .*{complaint}") as warned:
        for _ in range(2):
            words, _ = quantize(pages, LAYOUT)
    assert len(warned) == 1
    assert torch.equal(words, codec.quantize(pages, LAYOUT)[0])


def test_every_kind_is_tried_once(kernels, device):
    problems = [problem(bits) for bits in (2, 3, 2, 3)]
    kernels.clear()
    for each in problems:
        attend(*each, scaling=0.125)
    assert kernels == ["attend", "attend"]


def test_nothing_is_tried_while_a_graph_is_captured(kernels, device, monkeypatch):
    monkeypatch.setattr(trial, "_is_capturing", lambda: True)
    query, key, value = problem()
    kernels.clear()
    attend(query, key, value, scaling=0.125)
    assert kernels == []
