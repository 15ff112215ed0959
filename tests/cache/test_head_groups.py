"""KV heads in groups: each is stored as a layer of its own would be, and attention is that of all heads together."""

import pytest
import torch
from architectures import build
from composing import plan_for
from teaching import changes_nothing, follows_beams, ids, teacher_forced
from transformers.cache_utils import DynamicLayer

from kvmix_cli.cache import mixed
from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.errors import PlanError
from kvmix_cli.plan import LayerPlan, Plan, TensorPlan
from kvmix_cli.plan.layers import HeadGroup
from kvmix_cli.plan.tokens import TokenPolicy, TokenShares
from kvmix_cli.plan.transforms import Rotate, Transforms

DUO = {"tokens": TokenPolicy(score="recency", keep=4 + 10, flush=16)}
"""Streaming heads: sinks and the latest tokens."""
KEEPS_ALL = TokenShares(evict=0.0)


def grouped(model, groups, axes=None, k=16, v=16):
    """The plan of a model whose layers all have these head groups."""
    plan = plan_for(model, axes or {}, k, v)
    layers = {index: layer.model_copy(update={"head_groups": groups}) for index, layer in plan.layers.items()}
    return Plan.build(plan.model, layers, plan.cache)


@pytest.fixture(scope="module")
def model():
    model = build("llama", torch.float32, wide=True)
    model.set_attn_implementation("kvmix")
    return model


FOUR = TensorPlan(bits=4)
CASES = {
    "widths": ((HeadGroup(heads=(1,), k=FOUR, v=FOUR),), {}),
    "budgets": ((HeadGroup(heads=(0,), tokens=KEEPS_ALL),), {"tokens": TokenPolicy(keep=400, flush=32)}),
    "transforms": (
        (HeadGroup(heads=(0,), k=TensorPlan(bits=16)),),
        {"transforms": Transforms(k=(Rotate(),)), "tokens": TokenPolicy(keep=400, flush=32)},
    ),
}


@pytest.mark.parametrize("name", ["budgets", "transforms"])
@pytest.mark.parametrize("padding", [0, 25])
@pytest.mark.parametrize("implementation", ["kvmix", "sdpa"])
def test_at_16_bits_nothing_changes(model, name, padding, implementation):
    if implementation == "sdpa" and padding:
        pytest.skip("needs the queries, which sdpa does not show")
    groups, axes = CASES[name]
    if implementation == "sdpa":
        axes = {**axes, "tokens": TokenPolicy(score="recency", keep=400, flush=32)}
    tokens, steps = ids(140), [90] + [1] * 4 + [46]
    model.set_attn_implementation(implementation)
    cache = MixedCache.from_plan(grouped(model, groups, axes), model.config)
    changes_nothing(model, cache, tokens, steps, padding)
    model.set_attn_implementation("kvmix")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "qwen2"])
def test_sink_logits_and_soft_caps_stay_with_their_heads(family):
    model = build(family, torch.float32, wide=True)
    model.set_attn_implementation("kvmix")
    plan = grouped(model, (HeadGroup(heads=(1,), tokens=KEEPS_ALL),), {"tokens": TokenPolicy(keep=400, flush=32)})
    tokens, steps = ids(120), [90] + [1] * 30
    got = teacher_forced(model, MixedCache.from_plan(plan, model.config), tokens, steps)
    expected = teacher_forced(model, unquantized_cache(model.config), tokens, steps)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_each_group_is_stored_as_a_layer_of_these_heads(model):
    """The keys and values that are held are those of a layer with the group's widths, head by head."""
    whole = {bits: plan_for(model, {}, bits, bits) for bits in (2, 4)}
    plan = grouped(model, CASES["widths"][0], {}, 2, 2)
    caches = [MixedCache.from_plan(each, model.config) for each in (whole[2], whole[4], plan)]
    tokens = ids(200)
    with torch.no_grad():
        for cache in caches:
            model(tokens, past_key_values=cache)
    two, four, both = (cache.layers[0] for cache in caches)  # the first layer sees no other's error
    for of in ("keys", "values"):
        found = getattr(both, of).dequantize()
        torch.testing.assert_close(found[:, 0], getattr(two, of).dequantize()[:, 0])
        torch.testing.assert_close(found[:, 1], getattr(four, of).dequantize()[:, 1])
    assert caches[2].nbytes == pytest.approx((caches[0].nbytes + caches[1].nbytes) / 2)


def test_streaming_heads_beside_heads_that_keep_all(model):
    """DuoAttention: what a streaming head drops, and what it costs."""
    plan = grouped(model, (HeadGroup(heads=(1,), tokens=KEEPS_ALL),), DUO, 4, 4)
    cache = MixedCache.from_plan(plan, model.config)
    with torch.no_grad():
        model(ids(300), past_key_values=cache)
        model(ids(1), past_key_values=cache)
    kept = [layer.stores[0].segments().kept_tokens for _, layer in cache.layers[0].groups]
    assert kept[1] == 301
    assert 14 <= kept[0] <= 14 + 16 + 1
    assert cache.nbytes == plan.cache_bytes(300, 2, 4).total + 2 * plan.unquantized_bytes(1, element_bytes=4)
    with pytest.raises(PlanError, match=r"cannot go back"):
        cache.crop(-100)
    assert cache.get_seq_length() == 301
    assert [layer.get_seq_length() for _, layer in cache.layers[0].groups] == [301, 301]
    handle = cache.layers[0].keys
    assert handle.evicted_tokens == (301 - kept[0]) / 2
    assert "groups=[1, 1]" in repr(handle)


def test_predicted_bits_are_means_over_groups(model):
    plan = grouped(model, CASES["widths"][0], {}, 2, 2)
    assert plan.bits.nominal == 3
    assert (
        plan.cache_bytes(500).total
        == (plan_for(model, {}, 2, 2).cache_bytes(500).total + plan_for(model, {}, 4, 4).cache_bytes(500).total) / 2
    )


def test_beams_and_going_back(model):
    plan = grouped(model, CASES["widths"][0], {}, 2, 2)
    one, other = (MixedCache.from_plan(plan, model.config) for _ in range(2))
    follows_beams(model, one, other, ids(200))
    one.crop(-150)
    assert one.get_seq_length() == 52
    one.reset()
    assert one.get_seq_length() == 0


def test_a_file_holds_every_group(model, tmp_path):
    plan = grouped(
        model, (HeadGroup(heads=(1,), k=FOUR, tokens=KEEPS_ALL),), {"tokens": TokenPolicy(keep=60, flush=16)}, 2, 2
    )
    tokens, cache = ids(200), MixedCache.from_plan(plan, model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors", tokens, model)
        again = MixedCache.load(tmp_path / "cache.safetensors", plan, model)
        for _ in range(20):
            logits = [model(ids(1), past_key_values=each).logits for each in (cache, again)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_presses_of_kvpress_are_refused(model):
    axes = {"tokens": TokenPolicy(score="press:SnapKVPress()", evict=0.5, flush=32)}
    with pytest.raises(PlanError, match=r"layer 0: the score `press:SnapKVPress\(\)` is of all KV heads together"):
        mixed._check_groups(0, DynamicLayer(), grouped(model, (HeadGroup(heads=(1,), k=FOUR),), axes))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((HeadGroup(heads=(2,)),), r"layers\.0\.head_groups: the layer has KV heads 0-1, and no head 2"),
        ((HeadGroup(heads=(0,)), HeadGroup(heads=(0, 1))), "KV head 0 is in two groups"),
        ((HeadGroup(heads=(0,), tokens=KEEPS_ALL),), "there is no token policy, cache.tokens"),
    ],
)
def test_groups_that_do_not_fit(model, groups, message):
    with pytest.raises(PlanError, match=message):
        grouped(model, groups)


@pytest.mark.parametrize("heads", [(), (1, 0), (0, 0)])
def test_heads_of_a_group_ascend(heads):
    with pytest.raises(ValueError, match="KV heads in ascending order, at least one"):
        HeadGroup(heads=heads)


def test_a_layer_without_groups_has_the_checksum_it_had():
    layer = LayerPlan(k=FOUR, v=FOUR)
    assert layer.model_dump() == {"k": FOUR.model_dump(), "v": FOUR.model_dump()}
    assert layer.parts(3) == [((0, 1, 2), layer)]
