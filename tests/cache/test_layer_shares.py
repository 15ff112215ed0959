"""Layers that share out what they keep by a prompt's attention: measures in plain loops, and whole models."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from architectures import build
from composing import plan_for
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels.sorted_tokens import EVICTED
from teaching import changes_nothing, follows_beams, ids

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.cache.observation import AttentionCall
from kvmix_cli.cache.policies.layers import LAYER_MEASURES, WEAK
from kvmix_cli.cache.tokens.shares import LayerShares, SharingLayer
from kvmix_cli.errors import CacheError, PlanError
from kvmix_cli.plan import LayerPlan, Plan
from kvmix_cli.plan.layers import HeadGroup
from kvmix_cli.plan.tokens import Tier, TokenPolicy, TokenShares

PAGE, FLUSH = 16, 64
EVICTING = {"tokens": TokenPolicy(evict=0.5, by_layer="mass", flush=FLUSH)}


@pytest.fixture(scope="module")
def model():
    built = build("llama", torch.float32, wide=True)
    built.set_attn_implementation("kvmix")
    with torch.no_grad():  # sharper attention from layer to layer
        for index, layer in enumerate(built.model.layers):
            layer.self_attn.q_proj.weight *= 2.5**index
    return built


def cache_of(model, axes=EVICTING, k=16, v=16):
    return MixedCache.from_plan(plan_for(model, axes, k, v), model.config)


def attention_of(query, keys, mask):
    """Weights `[B, H, S, n]` in float64, zeros where nothing may be seen."""
    ratio = query.shape[1] // keys.shape[1]
    logits = query.double() @ keys.double().repeat_interleave(ratio, dim=1).mT
    return logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0).numpy()


def variance(weights, mask):
    found = []
    for row, seen in zip(weights, mask, strict=True):
        tokens = seen[0].any(0)
        found.append([np.var(head.sum(0)[tokens]) for head in row])
    heads = np.mean(found, axis=0)
    spread = heads.max() - heads.min()
    return math.exp(-np.mean((heads - heads.min()) / spread))


def sparsity(weights, mask):
    strong = pairs = 0
    for row, seen in zip(weights, mask, strict=True):
        for head in row:
            for query in range(len(head) - 32, len(head)):
                mine = head[query][seen[0, query]]
                strong += sum(weight >= WEAK * mine.max() for weight in mine)
                pairs += len(mine)
    return strong / pairs


def mass(weights, mask):
    found = []
    for row, seen in zip(weights, mask, strict=True):
        received = row.sum((0, 1))[seen[0].any(0)]
        needed, total = 0, 0.0
        for each in sorted(received, reverse=True):
            needed, total = needed + 1, total + each
            if total >= 0.975 * received.sum():
                break
        found.append(needed / len(received))
    return np.mean(found)


@pytest.mark.parametrize("name", ["variance", "sparsity", "mass"])
@pytest.mark.parametrize("padding", [0, 9])
def test_measures_are_those_of_plain_loops(name, padding):
    """A prompt so short that all of its queries are looked at."""
    torch.manual_seed(0)
    query, keys = torch.randn(2, 4, 60, 16), torch.randn(2, 2, 60, 16)
    mask = torch.ones(60, 60, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[0, ..., :padding] = False
    call = AttentionCall(query, 1.0, mask if padding else None)
    expected = {"variance": variance, "sparsity": sparsity, "mass": mass}[name]
    weights = attention_of(query, keys, mask)
    assert LAYER_MEASURES[name](call, keys) == pytest.approx(expected(weights, mask.numpy()), rel=1e-4)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.floats(1e-6, 1.0), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 9),
    st.booleans(),
)
def test_totals_are_those_of_the_plan(layers, flushes, is_whole):
    """Whatever the weights, layers of one kind have together what the plan gives them, and each a page."""
    known = {index: SharingLayer(Fraction(pages, 4), is_whole, kind) for index, (pages, _, kind) in enumerate(layers)}
    shares = LayerShares("mass", PAGE, known)
    for index, (_, weight, _) in enumerate(layers):
        shares.take(index, weight)
    found = {index: shares.pages(index, flushes * FLUSH) for index in known}
    for kind in (False, True):
        alike = [index for index, (_, _, each) in enumerate(layers) if each == kind]
        assert sum(found[index] for index in alike) == flushes * sum(layers[index][0] for index in alike)
        for one, other in combinations(alike, 2):
            if layers[one][1] < layers[other][1]:
                assert found[one] <= found[other]
    assert all(1 <= pages <= flushes * 4 - (not is_whole) for pages in found.values())


def kept_of(cache):
    """Tokens that each layer's KV heads hold of those that have left the window, `[layers]`."""
    return [int((layer._tokens.sorted.view != EVICTED).sum(-1).flatten()[0]) for layer in cache.layers]


@pytest.mark.parametrize("by", ["variance", "sparsity", "mass"])
def test_layers_keep_what_their_prompt_has(model, by):
    """Numbers differ, their sum does not, and later flushes are shared out alike."""
    axes = {"tokens": EVICTING["tokens"].model_copy(update={"by_layer": by})}
    plan, found = plan_for(model, axes, 4, 4), set()
    for seed in range(2):
        cache, tokens = MixedCache.from_plan(plan, model.config), ids(400, seed=seed)
        with torch.no_grad():
            model(tokens[:, :333], past_key_values=cache)
            model(tokens[:, 333:334], past_key_values=cache)
        kept = kept_of(cache)
        assert sum(kept) == len(kept) * 256 // 2
        weights = [cache.layers[0].shares.weight(index) for index in range(len(kept))]
        for one, other in combinations(range(len(kept)), 2):
            assert (kept[one] - kept[other]) * (weights[one] - weights[other]) >= 0
        assert len(set(kept)) > 1 or by == "variance", "which is the same for any layer of two heads"
        statistics = 2 * 4 * axes["tokens"].statistics.numbers(2, 333) * len(kept)
        predicted = plan.cache_bytes(333, 2, 4).total + 2 * plan.unquantized_bytes(1, element_bytes=4)
        assert predicted <= cache.nbytes <= predicted + statistics
        found.add(cache.nbytes)
        with torch.no_grad():
            model(tokens[:, 334:], past_key_values=cache)
            model(tokens[:, :1], past_key_values=cache)
        assert sum(kept_of(cache)) == len(kept) * (256 + 64 + 64) // 2
    assert len(found) == 1


@pytest.mark.parametrize("padding", [0, 25])
def test_nothing_changes_in_full_precision(model, padding):
    """Tiers of 16 bits, of another share in every layer."""
    axes = {"tokens": TokenPolicy(tiers=(Tier(share=0.5, k=16, v=16),), by_layer="sparsity", flush=FLUSH)}
    tokens, steps = ids(260), [200] + [1] * 4 + [56]
    cache = cache_of(model, axes)
    changes_nothing(model, cache, tokens, steps, padding, tolerance=1e-4)
    held = [[len(form.view[0, 0]) for form in layer.stores[0].packing._forms] for layer in cache.layers]
    assert len({tuple(each) for each in held}) > 1


def test_a_layer_that_drops_nothing_is_no_part_of_it(model):
    plan = plan_for(model, EVICTING, 4, 4)
    layers = {**plan.layers, 0: plan.layers[0].model_copy(update={"tokens": TokenShares(evict=0.0)})}
    cache = MixedCache.from_plan(Plan.build(plan.model, layers, plan.cache), model.config)
    with torch.no_grad():
        model(ids(400), past_key_values=cache)
        model(ids(1), past_key_values=cache)
    assert cache.layers[0].stores[0].segments().kept_tokens == 401
    kept = [layer.stores[0].segments().kept_tokens for layer in cache.layers[1:]]
    assert sum(kept) == 3 * (401 - 384 // 2)


def test_heads_and_layers_may_both_follow_the_prompt(model):
    axes = {"tokens": TokenPolicy(score="snapkv", evict=0.5, sure=0.2, by_layer="sparsity", flush=FLUSH)}
    cache = cache_of(model, axes, 4, 4)
    with torch.no_grad():
        model(ids(400), past_key_values=cache)
        model(ids(1), past_key_values=cache)
    kept = torch.stack([(layer._tokens.sorted.view != EVICTED).sum(-1) for layer in cache.layers])
    assert (kept.sum((0, 2)) == 4 * 2 * 192).all()
    assert len(set(kept.flatten().tolist())) > 1


def test_a_prompt_that_is_scored_later(model):
    axes = {"tokens": TokenPolicy(score="kvzip", evict=0.5, by_layer="mass", flush=FLUSH)}
    cache = cache_of(model, axes, 4, 4)
    with torch.no_grad():
        model(ids(400), past_key_values=cache)
    for each in cache.held:
        each.layer.held.scores.uniform_()
        each.layer.release()
    kept = kept_of(cache)
    assert sum(kept) == 4 * 320 // 2
    assert len(set(kept)) > 1


def test_beams_files_and_going_back(model, tmp_path):
    plan, tokens = plan_for(model, EVICTING, 2, 2), ids(300)
    one, other = (MixedCache.from_plan(plan, model.config) for _ in range(2))
    follows_beams(model, one, other, tokens)
    with torch.no_grad():
        with pytest.raises(PlanError, match="a token policy has evicted"):
            one.crop(-280)
        one.reset()
        model(tokens, past_key_values=one)
        one.save(tmp_path / "cache.safetensors", tokens, model)
        again = MixedCache.load(tmp_path / "cache.safetensors", plan, model)
        for _ in range(70):
            logits = [model(ids(1), past_key_values=each).logits for each in (one, again)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    assert kept_of(one) == kept_of(again)


def test_a_damaged_weight_is_told(model):
    class Damaged:
        def fact(self, name, value):
            return 3.0

        def fault(self, name, why):
            return CacheError(f"{name} {why}")

    with pytest.raises(CacheError, match=r"weight is 3\.0; expected a number from 0 to 1"):
        cache_of(model).layers[0].shares.exchange(Damaged(), 0)


@pytest.mark.parametrize(
    "given",
    [
        {"evict": 0.0, "tiers": (Tier(share=0.2, k=8, v=8), Tier(share=0.2, k=4, v=4))},
        {"tiers": (Tier(share=0.2, k=8, v=8),)},
        {"evict": 0.0, "keep": 400},
        {"weigh": True, "score": "subgen"},
    ],
)
def test_what_it_does_not_go_with(given):
    with pytest.raises(ValueError, match="by_layer: mass shares out one number among layers: evict, or a single tier"):
        TokenPolicy(**{"evict": 0.5, "by_layer": "mass", **given})


def test_groups_of_heads_are_refused(model):
    plan = plan_for(model, EVICTING, 4, 4)
    layer = LayerPlan(k=plan.layers[0].k, v=plan.layers[0].v, head_groups=(HeadGroup(heads=(0,)),))
    with pytest.raises(PlanError, match=r"layers that share out tokens as the prompt has it \(by_layer\)"):
        Plan.build(plan.model, {**plan.layers, 1: layer}, plan.cache)
