"""The Triton kernels compiled for GPUs that are not here: count and kind of their instructions, and their memory.

Compiling takes seconds a kernel, so widths and capabilities are paired, not multiplied: every width meets both kinds of
tensor cores, in the pages of one test or the runs and small pages of another.
"""

import pytest

pytest.importorskip("triton")
import aot
import torch
from aot_cases import (
    RUNS,
    compile_attend,
    compile_blocks,
    compile_coded,
    compile_coded_blocks,
    compile_coded_store,
    compile_encode,
    compile_quantize,
    compile_store,
    lane_instructions_per_code,
    lane_instructions_per_plane_code,
    main_loop,
    plane_loops,
    segments,
)
from kvmix_kernels.attend import AttentionProblem
from kvmix_kernels.attend.triton import attend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not aot.HAS_TOOLS, reason="ptxas, nvdisasm and cuobjdump are not in this triton"),
]

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
BUDGET = {2: 2.2, 3: 3.5, 4: 2.5}
"""Lane instructions per code, by bits; kernels/README.md has today's figures."""
RUNS_BUDGET = {"16, 4 and 2": 3.1, "3 and 8": 4.4}
SMALL_PAGES_BUDGET = 6.6
PLANES_BUDGET = {4: 3.3, 2: 2.8, 1: 2.5}
"""Of transform codes, by the bits of a plane; keys and values alike."""
PLANES_IN_BLOCKS_BUDGET = {4: 3.5, 2: 3.0, 1: 2.7}
"""The same in an engine's blocks, which a table lists."""
BLOCKS_BUDGET = {(2, 2): 2.1, (8, 4): 3.3, (16, 16): 1.2}
SPILLS = ("STL", "LDL")
CONVERSIONS = ("I2F", "I2FP", "F2I")


def check(kernel, capability):
    registers, stack = kernel.usage
    assert stack == 0, f"{kernel.name} spills at {registers} registers"
    assert kernel.shared <= SHARED_MEMORY[capability]


def check_planes(kernel, capability, budget):
    check(kernel, capability)
    for (kind, bits), loop in plane_loops(kernel).items():
        assert not any(loop[name] for name in CONVERSIONS), f"codes of {kind}s are converted to numbers"
        assert lane_instructions_per_plane_code(kernel, loop) <= budget[bits]


def check_exact_divisions(kernel, capability):
    check(kernel, capability)
    assert "div.full" not in kernel.ptx
    assert "div.rn.f32" in kernel.ptx
    assert "fma.rn.f32" not in kernel.ptx


@pytest.mark.parametrize(("capability", "bits"), [(80, 3), (90, 2), (90, 4)])
def test_packed_attention_is_as_cheap_as_it_was(capability, bits):
    kernel, merge = compile_attend(capability, bits, bits)
    check(kernel, capability)
    check(merge, capability)
    loop = main_loop(kernel)
    assert not any(loop[name] for name in CONVERSIONS), "codes are converted to numbers"
    assert lane_instructions_per_code(kernel) <= BUDGET[bits]


@pytest.mark.parametrize(("capability", "runs"), [(80, "16, 4 and 2"), (90, "3 and 8")])
def test_keys_in_runs_of_channels_spill_nothing_in_the_loop(capability, runs):
    kernel, _ = compile_attend(capability, RUNS[runs], 2)
    assert kernel.shared <= SHARED_MEMORY[capability]
    loop = main_loop(kernel)
    assert not any(loop[name] for name in (*CONVERSIONS, *SPILLS))
    assert lane_instructions_per_code(kernel) <= RUNS_BUDGET[runs]


def test_small_pages_are_read_together():
    kernel, _ = compile_attend(90, 3, 4, group=32, page=32)
    check(kernel, 90)
    assert not any(main_loop(kernel)[name] for name in CONVERSIONS)
    assert lane_instructions_per_code(kernel, tokens=64) <= SMALL_PAGES_BUDGET


def test_mixed_widths_compile_for_tensor_cores():
    kernel, _ = compile_attend(80, 8, 1, group=64)
    check(kernel, 80)
    assert not any(main_loop(kernel)[name] for name in CONVERSIONS)


@pytest.mark.parametrize(("capability", "k_bits", "v_bits"), [(80, 2, 2), (80, 16, 16), (90, 8, 4)])
def test_attention_over_an_engines_blocks_is_as_cheap_as_it_was(capability, k_bits, v_bits):
    kernel, merge = compile_blocks(capability, k_bits, v_bits)
    check(kernel, capability)
    check(merge, capability)
    assert not any(main_loop(kernel)[name] for name in CONVERSIONS)
    assert lane_instructions_per_code(kernel) <= BLOCKS_BUDGET[k_bits, v_bits]


@pytest.mark.parametrize(("capability", "kind", "bits"), [(80, "key", 3), (90, "value", 2)])
def test_storing_in_an_engines_blocks_divides_exactly_and_writes_bits_atomically(capability, kind, bits):
    kernel = compile_store(capability, kind, bits, group=64)
    check_exact_divisions(kernel, capability)
    assert any(f".{operation}.b32" in kernel.ptx for operation in ("and", "or"))


@pytest.mark.parametrize("capability", [80, 90])
def test_attention_to_transform_codes_is_as_cheap_as_it_was(capability):
    check_planes(compile_coded(capability), capability, PLANES_BUDGET)


@pytest.mark.parametrize("capability", [80, 90])
def test_attention_to_transform_codes_in_an_engines_blocks_is_as_cheap_as_it_was(capability):
    check_planes(compile_coded_blocks(capability), capability, PLANES_IN_BLOCKS_BUDGET)


@pytest.mark.parametrize(("capability", "kind"), [(80, "value"), (90, "key")])
def test_transform_codes_are_stored_with_exact_divisions_and_bits_written_atomically(capability, kind):
    kernel = compile_coded_store(capability, kind)
    check_exact_divisions(kernel, capability)
    assert any(f".{operation}.b32" in kernel.ptx for operation in ("and", "or"))


@pytest.mark.parametrize(("capability", "kind"), [(80, "key"), (90, "value")])
def test_transform_codes_are_made_with_exact_divisions(capability, kind):
    kernel = compile_encode(capability, kind)
    check_exact_divisions(kernel, capability)
    assert ".ftz" not in kernel.ptx.replace("cvt.rmi.ftz", "")  # of a number of at least 1/2, which is never flushed


def test_quantizing_divides_as_exactly_as_the_reference():
    kernel = compile_quantize(90, "key", 3)
    check(kernel, 90)
    assert "div.full" not in kernel.ptx
    assert "div.rn.f32" in kernel.ptx
    assert ".ftz" not in kernel.ptx


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("encoder", ["refit", "search"])
def test_fitting_contracts_no_multiply_adds(kind, encoder):
    kernel = compile_quantize(90, kind, 2, group=64, encoder=encoder)
    assert kernel.shared <= SHARED_MEMORY[90]
    assert "fma.rn.f32" not in kernel.ptx
    assert "div.full" not in kernel.ptx
    assert ".ftz" not in kernel.ptx


def test_no_length_or_mask_makes_it_compile_again():
    with aot.ahead_of_time(90) as compiled:
        for pages, tail in ((1, 1), (2, 16), (16, 17), (31, 128)):
            key, value = (segments(kind, 2, 64, 64, pages, tail) for kind in ("key", "value"))
            mask = torch.ones(1, 1, 2, 128 * pages + tail, dtype=torch.bool)
            query = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
            attend(AttentionProblem(query, key, value, scaling=0.1, mask=mask))
    assert len({id(each.kernel) for each in compiled if each.name == "attend_kernel"}) == 1
    assert len({id(each.kernel) for each in compiled if each.name == "merge_kernel"}) == 1
