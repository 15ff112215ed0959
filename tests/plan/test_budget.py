"""Bits and bytes: checked against hand counts and against the tensors that the codec makes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvmix_kernels.quantize import naive
from made_up import make_info, patient, plans

from kvmix_cli.plan import CacheSettings, Plan, TensorPlan
from kvmix_cli.plan.forms import page_layout
from kvmix_cli.plan.sizes import CacheBytes, format_bytes, mean_bits, packed_tokens, tensor_bits
from kvmix_cli.plan.windows import NoWindow, Recent


@pytest.mark.parametrize(
    ("bits", "group", "stored"),
    [(2, 32, 3.0), (3, 32, 4.0), (4, 32, 5.0), (2, 64, 2.5), (16, 32, 16), (1, "row", 1.25)],
)
def test_stored_bits_of_keys(bits, group, stored):
    """Scale and zero of 16 bits each for every group; a row of keys is a page of 128 tokens."""
    cache = CacheSettings(group_size=group)
    assert tensor_bits(TensorPlan(bits=bits), "key", cache, 64, "stored") == stored
    assert tensor_bits(TensorPlan(bits=bits), "key", cache, 64, "nominal") == bits


def test_a_tensors_own_group_size_counts():
    cache = CacheSettings(group_size=64)
    assert tensor_bits(TensorPlan(bits=2, group_size=32), "value", cache, 128, "stored") == 3.0


@pytest.mark.slow
@patient
@given(plans(6), st.integers(1, 5000), st.integers(1, 4))
def test_bytes_are_those_of_the_tensors(plan, context, batch):
    packed = full = 0
    for layer in plan.layers.values():
        for tensor, kind in layer.tensors:
            layout = page_layout(tensor, kind, plan.cache, plan.model.head_dim)
            tokens = packed_tokens(context, tensor.bits, plan.cache)
            full += (context - tokens) * plan.model.head_dim * 2
            if layout is not None:
                words, scales = naive.quantize(torch.zeros(plan.cache.page, plan.model.head_dim), layout)
                packed += tokens // plan.cache.page * (words.nbytes + scales.nbytes)
    heads = batch * plan.model.kv_heads
    counted = plan.cache_bytes(context, batch)
    assert counted == CacheBytes(heads * packed, heads * full)
    assert counted.total == counted.packed + counted.full


def test_sinks_window_and_the_open_page_are_in_full_precision():
    cache = CacheSettings(page=128, sink=4, window=Recent(tokens=100))
    assert [packed_tokens(context, 2, cache) for context in (0, 3, 231, 232, 359, 360)] == [
        0,
        0,
        0,
        128,
        128,
        256,
    ]
    assert packed_tokens(10_000, 16, cache) == 0


def test_sixteen_bits_everywhere_is_the_unquantized_cache():
    plan = Plan.uniform(make_info(4), 16, 16)
    for element_bytes in (2, 4):
        assert plan.cache_bytes(1000, 3, element_bytes).total == plan.unquantized_bytes(1000, 3, element_bytes)


def test_a_long_context_takes_its_stored_bits():
    plan = Plan.uniform(make_info(4), 4, 2, CacheSettings(sink=0, window=NoWindow()))
    context = 128 * 100
    share = plan.cache_bytes(context).total / plan.unquantized_bytes(context)
    assert share == plan.bits.stored / 16


def test_mean_bits_of_keys_of_values_and_of_both():
    plan = Plan.from_short("0:k4v2,1-3:k2v2", make_info(4))
    means = [mean_bits(plan.layers, plan.cache, plan.model, "nominal", kind) for kind in ("key", "value", None)]
    assert means == [2.5, 2.0, 2.25]
    assert mean_bits({}, plan.cache, plan.model, "nominal") == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1536, "1.5 KiB"), (8 * 2**30, "8 GiB"), (5 * 2**50, "5120 TiB")],
)
def test_sizes_for_people(count, text):
    assert format_bytes(count) == text
