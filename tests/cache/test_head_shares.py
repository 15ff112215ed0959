"""KV heads that keep different numbers of tokens, as each prompt has it: against plain loops, and in whole models."""

import numpy as np
import pytest
import torch
from architectures import build
from attending import dense, seen
from composing import BY_HEAD, plan_for
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels.attend import AttentionProblem, attend
from kvmix_kernels.sorted_tokens import EVICTED
from reference import dense_attention_lse
from teaching import changes_nothing, follows_beams, ids, teacher_forced

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.cache.policies.heads import kept_by_head
from kvmix_cli.errors import PlanError
from kvmix_cli.plan import CacheSettings
from kvmix_cli.plan.channels import ChannelGroup, ChannelPolicy
from kvmix_cli.plan.tokens import Tier, TokenPolicy, TokenShares
from kvmix_cli.plan.transforms import Balance, Center, Rotate, Transforms

PAGE, SINK = 16, 4


@pytest.fixture(scope="module")
def model():
    built = build("llama", torch.float32, wide=True)
    built.set_attn_implementation("kvmix")
    return built


def cache_of(model, k=16, v=16, axes=BY_HEAD):
    return MixedCache.from_plan(plan_for(model, axes, k, v), model.config)


def by_hand(scores, kept, sure, page):
    """AdaKV in loops: the sure tokens of each head, then the best of all others, then whole pages."""
    heads = len(scores)
    best = [sorted(row, reverse=True) for row in scores.tolist()]
    certain = int(sure * kept)
    rest = sorted(((score, head) for head, row in enumerate(best) for score in row[certain:]), reverse=True)
    numbers = [certain] * heads
    for _, head in rest[: heads * (kept - certain)]:
        numbers[head] += 1
    pages = [number // page for number in numbers]
    order = sorted(range(heads), key=lambda head: (-(numbers[head] % page), head))
    for head in order[: heads * kept // page - sum(pages)]:
        pages[head] += 1
    return [number * page for number in pages]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(2, 5),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    st.sampled_from([1, 4]),
    st.integers(0, 2**16),
)
def test_numbers_are_those_of_adakv(heads, pages, kept, sure, page, seed):
    kept = min(kept, pages)
    scale = np.random.default_rng(seed).exponential(size=(2, heads, 1))
    scores = torch.from_numpy(np.random.default_rng(seed + 1).exponential(size=(2, heads, pages * page)) * scale)
    found = kept_by_head(scores, kept * page, sure, page)
    assert found.tolist() == [by_hand(row, kept * page, sure, page) for row in scores]
    assert (found.sum(1) == heads * kept * page).all()
    if sure == 1.0:
        assert (found == kept * page).all()


def kept_of(layer):
    """Tokens that each KV head of each sequence holds, `[B, H_kv]`."""
    return (layer._tokens.sorted.view != EVICTED).sum(-1)


@pytest.mark.parametrize("bits", [16, 4])
def test_heads_keep_what_their_prompt_has_best(model, bits):
    """What is attended to is what stays, whichever head it is of; other sequences have other numbers."""
    cache, tokens = cache_of(model, bits, bits), ids(400, batch=3)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        model(ids(1, batch=3), past_key_values=cache)
    numbers = torch.stack([kept_of(layer) for layer in cache.layers])
    left = cache.layers[0].stores[0].packed_tokens
    assert left == 384
    assert (numbers.sum(-1) == 2 * left // 2).all()
    assert (numbers % PAGE == 0).all()
    assert (numbers >= int(0.2 * left / 2) // PAGE * PAGE).all()
    assert len({tuple(row) for row in numbers[0].tolist()}) > 1 or (numbers != left // 2).any()
    key, value = (store.segments() for store in cache.layers[0].stores)
    assert key.kept_tokens == 401 - left // 2
    query = torch.randn(3, 4, 1, key.tail.shape[3])
    expected, _ = dense_attention_lse(query, dense(key), dense(value), 1.0, seen(query, key, None), None, None)
    got = attend(AttentionProblem(query, key, value, 1.0))[0]
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


def test_all_sure_is_what_heads_alike_keep(model):
    """With everything sure every head keeps as much, and the model computes what it does without the setting."""
    tokens, steps = ids(300), [200] + [1] * 3 + [97]
    alike, sure = (
        cache_of(model, 4, 4, {"tokens": TokenPolicy(score="snapkv", evict=0.5, sure=part, flush=64)})
        for part in (None, 1.0)
    )
    logits = [teacher_forced(model, cache, tokens, steps) for cache in (alike, sure)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("padding", [0, 25])
def test_nothing_changes_while_nothing_is_dropped(model, padding):
    """The prompt is shorter than a flush, and only it is cut; what is decoded fills pages of all heads alike."""
    tokens, steps = ids(200), [70] + [1] * 4 + [126]
    axes = {
        "tokens": BY_HEAD["tokens"].model_copy(update={"when": "prompt"}),
        "transforms": Transforms(k=(Rotate(), Balance()), v=(Center(),)),
    }
    cache = cache_of(model, axes=axes)
    changes_nothing(model, cache, tokens, steps, padding)
    assert cache.layers[0].stores[0].packed_tokens == 64
    keys = cache.layers[0].keys.dequantize()
    cache.crop(-150)
    assert cache.layers[0].stores[0].packed_tokens == 0
    torch.testing.assert_close(cache.layers[0].keys.dequantize(), keys[:, :, :50], rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing_for_the_other_sequences(model):
    tokens = ids(300)
    mask = torch.ones_like(tokens)
    mask[0, :40] = 0
    alone = teacher_forced(model, cache_of(model, 4, 4), tokens[1:], [220] + [1] * 3 + [77])
    both = teacher_forced(model, cache_of(model, 4, 4), tokens, [220] + [1] * 3 + [77], mask)
    torch.testing.assert_close(both[1], alone[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [16, 2])
@pytest.mark.parametrize("context", [100, 333])
def test_predicted_bytes_are_allocated_whatever_the_prompt(model, bits, context):
    """But for the statistics of the token that is decoded."""
    plan, found = plan_for(model, BY_HEAD, bits, bits), set()
    predicted = plan.cache_bytes(context, 2, 4).total + 2 * plan.unquantized_bytes(1, element_bytes=4)
    for seed in range(2):
        cache = MixedCache.from_plan(plan, model.config)
        with torch.no_grad():
            model(ids(context, seed=seed), past_key_values=cache)
            model(ids(1), past_key_values=cache)
        found.add(cache.nbytes)
    statistics = 2 * 4 * BY_HEAD["tokens"].statistics.numbers(2, context) * len(plan.layers)
    assert predicted <= found.pop() <= predicted + statistics
    assert not found


def test_beams_go_with_their_pages(model):
    one, other = cache_of(model, 2, 2), cache_of(model, 2, 2)
    follows_beams(model, one, other, ids(300))
    with pytest.raises(PlanError, match=r"a token policy has evicted 128 of 256"):
        one.crop(-200)


def test_layers_may_have_shares_of_their_own():
    policy = BY_HEAD["tokens"]
    assert policy.of_layer(TokenShares(evict=0.25)).sure == 0.2
    assert policy.of_layer(TokenShares(evict=0.0)) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tiers": (Tier(share=0.2, k=8, v=8),)}, r"keep different numbers of tokens \(sure\) have no tiers"),
        ({"merge": "d2o"}, "have no merge"),
        ({"evict": 0.0, "keep": 400}, "sure is of a share of tokens that are dropped; add evict, without keep"),
        ({"sure": 1.5}, "less than or equal to 1"),
    ],
)
def test_what_it_does_not_go_with(given, message):
    with pytest.raises(ValueError, match=message):
        TokenPolicy(**{"score": "attention", "evict": 0.5, "sure": 0.2, **given})


def test_channels_are_refused():
    with pytest.raises(ValueError, match=r"keep different numbers of tokens \(sure\) have no runs of channels"):
        CacheSettings(
            page=32, tokens=BY_HEAD["tokens"], channels=ChannelPolicy(runs=(ChannelGroup(channels=16, bits=8),))
        )
