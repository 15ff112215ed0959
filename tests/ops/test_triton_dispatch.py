"""When the ops take the Triton kernels, and what they say when they do not."""

import sys

import pytest
import torch
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import AttentionProblem, attend
from kvmix_kernels.quantize import quantize
from kvmix_kernels.runtime import gpu
from kvmix_kernels.runtime.fallback import warn_once
from poisoned import segments
from warned import fallbacks, falls_back_once

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh():
    gpu.is_usable.cache_clear()
    warn_once.cache_clear()
    yield
    gpu.is_usable.cache_clear()


def pretend(monkeypatch, capability=(9, 0), cuda="13.0"):
    monkeypatch.setenv("KVMIX_TRITON", "1")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")


def test_a_cpu_has_no_use_for_them():
    assert not gpu.is_usable(torch.device("cpu"))


def test_a_new_enough_gpu_has(monkeypatch):
    pytest.importorskip("triton")
    pretend(monkeypatch)
    assert gpu.is_usable(CUDA)


def test_the_environment_can_do_without(monkeypatch, recwarn):
    pretend(monkeypatch)
    monkeypatch.setenv("KVMIX_TRITON", "0")
    assert not gpu.is_usable(CUDA)
    assert not fallbacks(recwarn)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"capability": (7, 5)}, "Old GPU has no bfloat16 tensor cores"), ({"cuda": None}, "they are for NVIDIA GPUs")],
)
def test_another_gpu_is_one_named_warning(monkeypatch, change, complaint):
    pytest.importorskip("triton")
    pretend(monkeypatch, **change)
    with falls_back_once(complaint):
        assert not gpu.is_usable(CUDA)
        assert not gpu.is_usable(CUDA)


def test_no_triton_is_one_named_warning(monkeypatch):
    pretend(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match="triton is not installed"):
        assert not gpu.is_usable(CUDA)


def test_quantizing_takes_them_where_it_can(monkeypatch):
    pytest.importorskip("triton")
    from kvmix_kernels.quantize import triton

    monkeypatch.setattr(triton, "is_trusted", lambda *args: True)
    monkeypatch.setattr(gpu, "is_usable", lambda device: True)
    monkeypatch.setattr(triton, "quantize", lambda *args: "quantized")
    monkeypatch.setattr("kvmix_kernels.quantize.library", lambda: None)
    assert quantize(torch.zeros(1, 1, 1, 64, 64), PageLayout("key", 2, 64, 64)) == "quantized"


def test_attention_takes_them_where_it_can(monkeypatch):
    pytest.importorskip("triton")
    from kvmix_kernels.attend import triton

    key, value = (segments(kind, 2, 0, 1, 5, head_dim=64, page=64, group=64) for kind in ("key", "value"))
    monkeypatch.setattr(gpu, "is_usable", lambda device: True)
    monkeypatch.setattr(triton, "is_trusted", lambda *args: True)
    monkeypatch.setattr(triton, "attend", lambda problem: ("attended", "logarithms"))
    assert attend(AttentionProblem(torch.zeros(2, 2, 1, 64), key, value, scaling=1.0)) == ("attended", "logarithms")


def test_what_has_no_kernel_is_one_named_warning(monkeypatch):
    pytest.importorskip("triton")
    key, value = (segments(kind, 2, 0, 1, 5, page=48) for kind in ("key", "value"))
    monkeypatch.setattr(gpu, "is_usable", lambda device: True)
    with falls_back_once("attention over pages of 48 tokens has no GPU kernel"):
        for _ in range(2):
            attend(AttentionProblem(torch.zeros(2, 2, 1, 32), key, value, scaling=1.0))
    with pytest.warns(UserWarning, match=r"quantizing float64 pages \[1, 1, 1, 64, 64\].* has no GPU kernel"):
        quantize(torch.zeros(1, 1, 1, 64, 64, dtype=torch.float64), PageLayout("key", 2, 64, 64))
