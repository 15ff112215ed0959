"""GPU kernels are tried before they are used: what passes is taken, what is wrong or fails is named once and left."""

import pytest
import torch
from poisoned import segments

pytest.importorskip("triton")
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import AttentionProblem, attend, naive
from kvmix_kernels.attend.triton import trial as attending
from kvmix_kernels.quantize import naive as codec
from kvmix_kernels.quantize import quantize
from kvmix_kernels.quantize import triton as quantizing
from kvmix_kernels.runtime import gpu, trial
from kvmix_kernels.runtime.fallback import warn_once
from warned import fallbacks, falls_back_once

CPU = torch.device("cpu")
CACHED = (attending.passes, quantizing.passes, warn_once)
LAYOUT = PageLayout("key", 2, 64, 64, 32)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Kernels that are right, without a GPU; the list of what they were asked for."""
    asked = []

    def right(name, definition):
        return lambda *args, **options: asked.append(name) or definition(*args, **options)

    for cached in CACHED:
        cached.cache_clear()
    monkeypatch.delenv("KVMIX_TRITON", raising=False)
    monkeypatch.setattr(attending, "attend", right("attend", naive.attend))
    monkeypatch.setattr(quantizing, "quantize", right("quantize", codec.quantize))
    yield asked
    for cached in CACHED:
        cached.cache_clear()


@pytest.fixture
def new_device(monkeypatch):
    """A device for which the operations find kernels, and that has had no trial yet."""
    monkeypatch.setattr(gpu, "is_usable", lambda device: True)
    monkeypatch.setattr("kvmix_kernels.quantize.library", lambda: None)
    monkeypatch.setattr("kvmix_kernels.attend.triton.attend", naive.attend)


@pytest.fixture
def device(new_device, monkeypatch):
    """The same, without the trials that come before everything else."""
    monkeypatch.setattr(quantizing, "first_layouts", list)
    monkeypatch.setattr(attending, "first_kinds", lambda device: [])


def half_as_much(problem):
    output, logarithms = naive.attend(problem)
    return output / 2, logarithms


def other_logarithms(problem):
    output, logarithms = naive.attend(problem)
    return output, logarithms + 1


def not_a_number(problem):
    output, logarithms = naive.attend(problem)
    return output * torch.nan, logarithms


def breaks(*args):
    raise RuntimeError("no such instruction\nin a long log")


def one_bit_off(pages, layout, encoder):
    words, scales = codec.quantize(pages, layout, encoder)
    words.view(-1)[7] ^= 1
    return words, scales


def make_problem(bits=2):
    key, value = (segments(kind, bits, 0, 1, 5, 64, 64, group=32) for kind in ("key", "value"))
    return AttentionProblem(torch.randn(2, 4, 1, 64), key, value, scaling=0.125)


def test_a_handful_of_trials_comes_before_the_first_use(kernels, new_device, recwarn):
    problem, pages = make_problem(), torch.randn(1, 1, 1, 64, 64)
    kernels.clear()
    for _ in range(2):
        attend(problem)
    assert kernels == ["attend"] * 3, "two first kinds, and that of the problem"
    kernels.clear()
    quantizing.passes.cache_clear()
    assert quantizing.is_trusted(CPU, LAYOUT, torch.float32)
    assert quantizing.is_trusted(CPU, LAYOUT, torch.float32)
    assert kernels == ["quantize"] * 2, "two first layouts, of which this is one"
    assert torch.equal(quantize(pages, LAYOUT)[0], codec.quantize(pages, LAYOUT)[0])
    assert not fallbacks(recwarn)


def test_kernels_that_are_taken_as_they_are_are_not_tried(kernels, new_device, monkeypatch):
    monkeypatch.setenv("KVMIX_TRITON", "1")
    problem = make_problem()
    kernels.clear()
    attend(problem)
    assert quantizing.is_trusted(CPU, LAYOUT, torch.float32)
    assert kernels == []


def test_an_operation_that_is_wrong_in_a_first_trial_is_left_to_pytorch(monkeypatch, new_device):
    monkeypatch.setattr(attending, "attend", half_as_much)
    monkeypatch.setattr("kvmix_kernels.attend.triton.attend", breaks)
    problem = make_problem(bits=3)
    with falls_back_once(r"attention over K2 V4 \(4 query heads .* fails its trial"):
        for _ in range(2):
            got, _ = attend(problem)
    torch.testing.assert_close(got, naive.attend(problem)[0], rtol=1e-3, atol=1e-3)  # the native path rounds to 16 bits


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
    problem = make_problem()
    with falls_back_once(f"attention over K2 V2 .* fails its trial.*{complaint}"):
        for _ in range(2):
            got, _ = attend(problem)
    torch.testing.assert_close(got, naive.attend(problem)[0], rtol=1e-3, atol=1e-3)  # the native path rounds to 16 bits


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [(one_bit_off, "its words differ from those of the definition"), (breaks, "RuntimeError: no such instruction$")],
)
def test_a_wrong_codec_is_named_once_and_left_to_pytorch(monkeypatch, device, kernel, complaint):
    monkeypatch.setattr(quantizing, "quantize", kernel)
    pages = torch.randn(1, 1, 1, 64, 64)
    with falls_back_once(f"quantizing keys to 2 bits in groups of 32 .*{complaint}"):
        for _ in range(2):
            words, _ = quantize(pages, LAYOUT)
    assert torch.equal(words, codec.quantize(pages, LAYOUT)[0])


def test_every_kind_is_tried_once(kernels, device):
    problems = [make_problem(bits) for bits in (2, 3, 2, 3)]
    kernels.clear()
    for problem in problems:
        attend(problem)
    assert kernels == ["attend", "attend"]


def test_nothing_is_tried_while_a_graph_is_captured(kernels, new_device, monkeypatch):
    monkeypatch.setattr(trial, "_is_capturing", lambda: True)
    problem = make_problem()
    kernels.clear()
    attend(problem)
    assert kernels == []
