"""Bits and bytes of tiers, runs and transforms: by hand, and the same for whoever asks in another way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import composed_plans, make_info, patient

from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TensorPlan
from kvmix_cli.plan.channels import ChannelGroup, ChannelPolicy
from kvmix_cli.plan.sizes import layer_bytes, packed_tokens, tensor_bits
from kvmix_cli.plan.tokens import Tier, TokenPolicy
from kvmix_cli.plan.transforms import Balance, Center, Rotate, Transforms
from kvmix_cli.plan.windows import NoWindow, Recent

MIKV = TokenPolicy(tiers=(Tier(share=0.2, k=8, v=8),), flush=160)
H2O = TokenPolicy(evict=0.75, flush=128)
RUNS = ChannelPolicy(runs=(ChannelGroup(channels=16, bits=16), ChannelGroup(channels=16, bits=4)), refresh=64)


def bits(own_bits, kind, count, head_dim=64, **axes):
    cache = CacheSettings(page=32, group_size=32, **axes)
    return tensor_bits(TensorPlan(bits=own_bits), kind, cache, head_dim, count)


@pytest.mark.parametrize(
    ("own_bits", "kind", "axes", "nominal", "stored"),
    [
        (2, "key", {"tokens": MIKV}, 0.2 * 8 + 0.8 * 2, 0.2 * 9 + 0.8 * 3 + 1 / 16),
        (2, "value", {"tokens": MIKV}, 0.2 * 8 + 0.8 * 2, 0.2 * 9 + 0.8 * 3 + 1 / 16),
        (16, "key", {"tokens": H2O}, 4, 4 + 1 / 16),
        (2, "key", {"tokens": H2O}, 0.5, 0.25 * 3 + 1 / 16),
        (2, "key", {"channels": RUNS}, (256 + 64 + 64) / 64, (256 + 16 * 5 + 32 * 3) / 64 + 8 / 64),
        (2, "value", {"channels": RUNS}, 2, 3),
        (16, "key", {"channels": RUNS}, 16, 16),
        (2, "key", {"transforms": Transforms(k=(Rotate(), Balance()))}, 2, 3),
    ],
)
def test_bits_by_hand(own_bits, kind, axes, nominal, stored):
    """In groups of 32 scale and zero are a bit; a tier is 8 bits a token, half for keys; an order 8 bits a channel."""
    assert bits(own_bits, kind, "nominal", **axes) == pytest.approx(nominal)
    assert bits(own_bits, kind, "stored", **axes) == pytest.approx(stored)


def test_an_order_for_the_whole_sequence_is_no_bits_but_bytes():
    once = RUNS.model_copy(update={"refresh": 0})
    assert bits(2, "key", "stored", channels=once) == bits(2, "key", "stored", channels=RUNS) - 8 / 64
    plans = [
        Plan.uniform(make_info(1), 2, 2, CacheSettings(page=32, sink=0, window=NoWindow(), channels=each))
        for each in (once, RUNS)
    ]
    few, many = (plan.cache_bytes(640).extra for plan in plans)
    queries = 2 * 2 * 64 * 4
    assert few == queries + 2 * 64
    assert many == queries + 2 * 64 * 10


def test_a_tier_is_never_narrower_than_the_layer():
    assert bits(16, "key", "nominal", tokens=MIKV) == 16
    assert bits(4, "key", "nominal", channels=ChannelPolicy(runs=(ChannelGroup(share=0.5, bits=2),))) == 4


@pytest.mark.slow
@patient
@given(composed_plans(), st.integers(0, 3000), st.integers(1, 3), st.sampled_from([2, 4]))
def test_bytes_add_up(plan, context, batch, element_bytes):
    """Over layers, over sequences; nothing is packed that is not a whole page."""
    whole = plan.cache_bytes(context, batch, element_bytes)
    one = plan.cache_bytes(context, 1, element_bytes)
    assert whole.total == whole.packed + whole.full + whole.extra == batch * one.total
    layers = [
        layer_bytes(layer, plan.cache, plan.model.heads(index), context, batch, element_bytes)
        for index, layer in plan.layers.items()
    ]
    assert sum(layer.total for layer in layers) == whole.total
    full = plan.unquantized_bytes(context, batch, element_bytes)
    assert whole.full <= full


@pytest.mark.slow
@patient
@given(composed_plans())
def test_a_long_context_takes_its_stored_bits(plan):
    """But for what a sequence has once, and the tokens that wait."""
    cache = plan.cache.model_copy(update={"sink": 0, "window": NoWindow()})
    plan = Plan.build(plan.model, plan.layers, cache)
    unit = cache.page if cache.tokens is None else cache.tokens.flush
    refresh = cache.channels.refresh if cache.channels else 0
    context = 60 * unit * (refresh // cache.page or 1) * 100
    share = plan.cache_bytes(context).total / plan.unquantized_bytes(context)
    assert 16 * share == pytest.approx(plan.bits.stored, rel=0.01)


def test_tokens_leave_the_window_in_flushes_and_by_the_wider_of_keys_and_values():
    cache = CacheSettings(page=32, sink=4, window=Recent(tokens=64), tokens=MIKV)
    assert [packed_tokens(context, 2, cache) for context in (227, 228, 387, 388)] == [0, 160, 160, 320]
    assert packed_tokens(1000, 16, cache) == 800
    layer = LayerPlan(k=TensorPlan(bits=16), v=TensorPlan(bits=2))
    counted = layer_bytes(layer, cache, make_info(1).heads(0), 228)
    keys, values = (228 * 2 * 64 * 2, 68 * 2 * 64 * 2)
    tail = 64 * 2 * 2 * 4
    assert (counted.full, counted.extra) == (keys + values, 160 * 2 + tail)


def test_what_a_layer_keeps_of_every_sequence():
    def kept(**axes):
        cache = CacheSettings(page=32, sink=0, window=NoWindow(), **axes)
        return Plan.uniform(make_info(1), 2, 2, cache).cache_bytes(32, batch=3).extra

    channels = 3 * 2 * 64 * 4
    assert kept(transforms=Transforms(k=(Rotate(), Balance(), Center()), v=(Balance(),))) == 3 * channels
    assert kept(transforms=Transforms(k=(Rotate(matrix="r"), Center(means="m")))) == 0
    assert kept(channels=RUNS) == 2 * channels + 3 * 2 * 64
    assert kept(tokens=MIKV) == 3 * 32 * 2 * 2 * 4
    assert kept(tokens=MIKV.model_copy(update={"score": "normalised"})) == 3 * 32 * (2 + 1) * 2 * 4
    assert kept(tokens=MIKV.model_copy(update={"score": "recency"})) == 0
