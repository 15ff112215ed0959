"""Bytes of a cache beside those of an unquantized one."""

import pytest
import torch
from evaluating import tiny, uniform

from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.decoding.feed import feed, prefill
from kvmix_cli.decoding.footprint import measure_footprint

TOKENS = 97
FULL = TOKENS * 8 * 2 * 2 * 64
"""Elements of 97 tokens in 8 layers: keys and values of 2 heads with 64 channels."""


@torch.inference_mode()
def filled(plan):
    config = tiny().model.config
    cache = unquantized_cache(config) if plan is None else MixedCache.from_plan(plan, config, reserve=TOKENS)
    prefill(tiny(), cache, list(range(TOKENS - 1)))
    list(feed(tiny(), cache, [5], step=1))
    return cache


def test_the_unquantized_cache_is_compared_at_16_bits():
    found = measure_footprint(filled(None), None, element_bytes=4)
    assert (found.bytes, found.unquantized_bytes, found.bf16_bytes) == (4 * FULL, 4 * FULL, 2 * FULL)
    assert (found.compression, found.quantized_share) == (0.5, 0)


def test_a_plans_cache_is_smaller_and_its_unquantized_size_is_that_of_the_stock_cache():
    found = measure_footprint(filled(uniform(2)), uniform(2), element_bytes=4)
    assert (found.unquantized_bytes, found.bf16_bytes) == (4 * FULL, 2 * FULL)
    assert found.compression == pytest.approx(2 * FULL / found.bytes)
    assert found.compression > 3
    assert 0.9 < found.quantized_share < 1
