"""The native library: bit for bit the naive codec on every instruction set; and how it is had or not."""

import os
import subprocess
import sys

import pytest
import torch
from attending import INSTRUCTION_SETS, instruction_sets, relative_rms, segments
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels import BITS, PageLayout
from kvmix_kernels.attend import attend, cpu, naive
from kvmix_kernels.quantize import cpu as quantize_cpu
from kvmix_kernels.quantize import naive as quantize_naive
from kvmix_kernels.runtime.fallback import warn_once
from kvmix_kernels.runtime.native import library
from kvmix_kernels.runtime.native.build import cache_dir, compiler

layouts = st.builds(
    PageLayout,
    kind=st.sampled_from(["key", "value"]),
    bits=st.sampled_from(BITS),
    head_dim=st.sampled_from([16, 64, 80, 96, 128]),
    page=st.sampled_from([16, 32, 128]),
    group_size=st.sampled_from([16, 32, 64, 128, None]),
    scale_dtype=st.sampled_from(["float16", "bfloat16"]),
)


needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler, so no native library")


def same_bits(one, other):
    return one.shape == other.shape and torch.equal(one.view(torch.int16), other.view(torch.int16))


@given(
    layout=layouts,
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    spread=st.sampled_from([1e-42, 1e-7, 1e-3, 1.0, 1e4]),
    constant=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_quantizes_bit_for_bit_like_the_reference(layout, dtype, spread, constant, seed):
    torch.manual_seed(seed)
    pages = (torch.randn(2, 2, 3, layout.page, layout.head_dim) * spread).clamp(-3e4, 3e4).to(dtype)
    if constant:
        pages[0, 0, 0] = spread
    expected = quantize_naive.quantize(pages, layout)
    for name in instruction_sets():
        words, scales = quantize_cpu.quantize(library(), pages, layout)
        assert torch.equal(words, expected[0]), name
        assert same_bits(scales, expected[1]), name


@given(layout=layouts, bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]), at=st.integers(0, 2**10))
@settings(max_examples=30, deadline=None)
def test_nan_and_inf_reach_the_scales(layout, bad, at):
    pages = torch.randn(1, 1, 1, layout.page, layout.head_dim)
    pages.view(-1)[at % pages.numel()] = bad
    for name in instruction_sets():
        assert not torch.isfinite(quantize_cpu.quantize(library(), pages, layout)[1]).all(), name


@given(
    bits=st.tuples(st.sampled_from([*BITS, 16]), st.sampled_from([*BITS, 16])),
    head_dim=st.sampled_from([16, 80, 128]),
    page=st.sampled_from([32, 128]),
    group=st.sampled_from([16, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_attends_to_every_shape_of_page(bits, head_dim, page, group, dtype, seed):
    torch.manual_seed(seed)
    shape = {"head_dim": head_dim, "page": page, "group": group, "dtype": dtype}
    key, value = (segments(kind, width, 4, 6, 9, **shape) for kind, width in zip(("key", "value"), bits, strict=True))
    query = torch.randn(2, 6, 2, head_dim)
    expected, _ = naive.attend(query.double(), key, value, scaling=head_dim**-0.5)
    for name in instruction_sets():
        got, _ = cpu.attend(library(), query, key, value, scaling=head_dim**-0.5)
        assert relative_rms(got, expected) < 1e-3, name


@needs_compiler
def test_any_number_of_threads_gives_the_same():
    torch.manual_seed(0)
    key, value = (segments(kind, 3, 4, 99, 9, batch=1, heads=1) for kind in ("key", "value"))
    pages = torch.randn(1, 3, 50, 16, 32)
    layout = PageLayout("key", 3, 32, 16, 16)
    query = torch.randn(1, 3, 1, 32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((attend(query, key, value, scaling=0.2), *quantize_cpu.quantize(library(), pages, layout)))
    finally:
        torch.set_num_threads(before)
    for attended, words, scales in results[1:]:
        assert relative_rms(attended, results[0][0].double()) < 1e-3  # coefficients are rounded to 16 bits
        assert torch.equal(words, results[0][1])
        assert same_bits(scales, results[0][2])


@needs_compiler
def test_groups_that_vectors_do_not_divide_fall_back_with_one_warning():
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="quantizing groups of 8 has no CPU kernel") as warned:
        key, value = (segments(kind, 4, 0, 3, 5, group=8) for kind in ("key", "value"))
    assert len(warned) == 1
    query = torch.randn(2, 2, 1, 32)
    with pytest.warns(UserWarning, match=r"heads of 32 in groups of \[8\] has no CPU kernel"):
        got = attend(query, key, value, scaling=1.0)
    assert torch.equal(got, naive.attend(query, key, value, scaling=1.0)[0])


USE = "from kvmix_kernels.runtime.native import instruction_set; print(instruction_set())"


def run(script, tmp_path, **environment):
    environment = {**os.environ, "KVMIX_CACHE_DIR": str(tmp_path), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_no_compiler_is_one_named_warning(tmp_path):
    output, complaint = run(USE, tmp_path, CXX="no-such-compiler").communicate()
    assert output.strip() == "none"
    assert complaint.count("UserWarning") == 1
    assert "no C++ compiler found" in complaint


@needs_compiler
def test_a_compiler_that_fails_is_one_named_warning(tmp_path):
    output, complaint = run(USE, tmp_path, KVMIX_CXXFLAGS="-no-such-flag").communicate()
    assert output.strip() == "none"
    assert "failed" in complaint
    assert "-no-such-flag" in complaint
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_a_cache_that_cannot_be_written_is_one_named_warning(tmp_path):
    (tmp_path / "file").write_text("")
    output, complaint = run(USE, tmp_path / "file").communicate()
    assert output.strip() == "none"
    assert "cannot be written" in complaint
    assert "KVMIX_CACHE_DIR" in complaint


@needs_compiler
def test_two_processes_may_build_at_once(tmp_path):
    both = [run(USE, tmp_path, KVMIX_CXXFLAGS="-O0") for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert all(output.strip() in INSTRUCTION_SETS for output, _ in outputs)
    assert [path.name for path in tmp_path.iterdir()] == [path.name for path in tmp_path.glob("kvmix-*.so")]
    again, complaint = run(USE, tmp_path, KVMIX_CXXFLAGS="-O0").communicate()
    assert again.strip() in INSTRUCTION_SETS
    assert "compiling" not in complaint


@needs_compiler
def test_the_environment_can_do_without(tmp_path):
    assert run(USE, tmp_path, KVMIX_NATIVE="0").communicate()[0].strip() == "none"
    assert run(USE, cache_dir(), KVMIX_ISA="generic").communicate()[0].strip() == "generic"
