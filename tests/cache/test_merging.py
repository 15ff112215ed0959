"""Tokens that are dropped and merged: rules against loops in float64, and what a whole model stores of them."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from architectures import build
from composing import plan_for
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels.attend import AttentionProblem, attend
from kvmix_kernels.segments import Segments
from kvmix_kernels.sorted_tokens import EVICTED
from teaching import ids, left_padded, swap_by_beams, teacher_forced

from kvmix_cli.cache.handle import Handle
from kvmix_cli.cache.merging import MERGES, LeavingTokens, Merge, left_padding
from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.cache.observation import AttentionCall
from kvmix_cli.cache.policies import TOKEN_SCORES, TokenScore
from kvmix_cli.errors import PlanError, PolicyError
from kvmix_cli.plan import CacheSettings
from kvmix_cli.plan.merges import OF_SEQUENCE, kept_numbers
from kvmix_cli.plan.tokens import Tier, TokenPolicy, TokenShares
from kvmix_cli.plan.transforms import Balance, Center, Rotate, Transforms

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Merges are float32; references are float64."""
FLUSH, SINK = 80, 4
DROPPED = 32
"""Of a flush."""
TOKENS = ids(200)


@pytest.fixture(scope="module")
def model():
    built = build("llama", wide=True)
    built.set_attn_implementation("kvmix")
    return built


@pytest.fixture(scope="module")
def states(model):
    """Keys and values `[B, H_kv, T, D]` of each layer, as the model makes them when nothing is dropped."""
    cache = unquantized_cache(model.config)
    teacher_forced(model, cache, TOKENS, [200])
    return [(layer.keys, layer.values) for layer in cache.layers]


def policy(merge="d2o", **more):
    return TokenPolicy(**{"evict": DROPPED / FLUSH, "flush": FLUSH, "merge": merge, **more})


def cache_of(model, k=16, v=16, transforms=None, **more):
    axes = {"tokens": policy(**more)} | ({"transforms": transforms} if transforms else {})
    return MixedCache.from_plan(plan_for(model, axes, k, v), model.config)


def cosines(keys):
    unit = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def nearest(keys, stays, is_token):
    """Return the place and the cosine of the token that stays with the most similar key, by dropped token."""
    found, table = {}, cosines(keys)
    for i in np.flatnonzero(~stays & is_token):
        allowed = [j for j in np.flatnonzero(stays) if is_token[j]]
        if allowed:
            best = max(allowed, key=lambda j: table[i, j])
            found[i] = best, table[i, best]
    return found


def d2o(keys, stays, is_token, threshold=None):
    """Return weights `[n, n]` of tokens (columns) in what is stored of each (rows), and the next threshold."""
    near, weights = nearest(keys, stays, is_token), np.eye(len(keys))
    if near:
        mean = np.mean([cosine for _, cosine in near.values()])
        threshold = mean if threshold is None else (threshold + mean) / 2
    for i, (j, cosine) in near.items():
        if cosine >= threshold:
            weights[j, i] = math.exp(cosine)
            weights[j, j] = math.e
    return weights / weights.sum(1, keepdims=True), threshold


def look_m(keys, stays, is_token):
    weights = np.eye(len(keys))
    for i, (j, _) in nearest(keys, stays, is_token).items():
        weights[j, i] = 1
    return weights / weights.sum(1, keepdims=True)


def kvmerger(keys, stays, is_token, attention=None):
    """Weights of the most attended token that stays in a run, or of the nearest one if no attention is known."""
    table, joined = cosines(keys), {}
    for i in np.flatnonzero(~stays & is_token):
        found = []
        for step in (-1, 1):
            j = i
            while 0 <= j + step < len(keys) and is_token[j + step] and table[j, j + step] > 0.75:
                j += step
                if stays[j]:
                    found.append(j)
                    if attention is None:
                        break
        if found:
            best = min(found, key=lambda j: abs(j - i)) if attention is None else max(found, key=attention.__getitem__)
            joined.setdefault(best, []).append(i)
    weights = np.eye(len(keys))
    for j, others in joined.items():
        distances = np.linalg.norm(keys[others] - keys[j], axis=1)
        weights[j, others] = np.exp(-((distances / distances.mean()) ** 2))
    return weights / weights.sum(1, keepdims=True)


def cam(attention, stays, is_token):
    weights = np.eye(len(attention))
    for i in np.flatnonzero(~stays & is_token):
        following = [j for j in np.flatnonzero(stays) if j > i][:32]
        if following:
            weights[following, i] = min(1, attention[i] / attention[following].mean()) / len(following)
    return weights


def leaving(keys, dropped, seed, padding=0):
    """Return random tokens, of which each KV head drops as many, the first `padding` of the first row padding."""
    drawn = torch.rand(keys.shape[:3], generator=torch.Generator().manual_seed(seed))
    stays = drawn.argsort(-1).argsort(-1) >= dropped
    is_token = torch.ones(keys.shape[0], 1, keys.shape[2], dtype=torch.bool)
    is_token[0, :, :padding] = False
    return LeavingTokens(keys, stays, dropped, is_token, drawn)


def started(name, batch, heads):
    """Return a rule that has been shown a prompt without padding."""
    rule = MERGES[name]()
    rule.see(AttentionCall(torch.zeros(batch, heads, 5, 16), 1.0), heads)
    return rule


@settings(deadline=None, max_examples=25)
@given(
    dropped=st.integers(1, 30),
    padding=st.sampled_from([0, 0, 5, 31, 32]),
    flushes=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_d2o_is_its_formula(dropped, padding, flushes, seed):
    rule, thresholds = started("d2o", 2, 3), [[None] * 3 for _ in range(2)]
    for number in range(flushes):
        keys, values = torch.randn(2, 2, 3, 32, 16, generator=torch.Generator().manual_seed(seed + number))
        tokens = leaving(keys, dropped, seed + number, padding)
        merge = rule.merge(tokens)
        for row in range(2):
            for head in range(3):
                own = [x[row, head].double().numpy() for x in (keys, values)]
                is_token = tokens.is_token[row, 0].numpy()
                weights, after = d2o(own[0], tokens.stays[row, head].numpy(), is_token, thresholds[row][head])
                thresholds[row][head] = after
                assert merge.has_keys
                for states, expected in zip((keys, values), own, strict=True):
                    got = merge.of(states)[row, head]
                    torch.testing.assert_close(got, torch.from_numpy(weights @ expected).float(), **CLOSE)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(["look-m", "kvmerger", "cam"]),
    dropped=st.integers(1, 59),
    padding=st.sampled_from([0, 0, 5, 59, 60]),
    seed=st.integers(0, 2**16),
)
def test_other_rules_are_their_formulas(name, dropped, padding, seed):
    """Keys that change slowly, so that there are runs of similar ones."""
    noise = torch.randn(2, 2, 3, 60, 16, generator=torch.Generator().manual_seed(seed))
    keys, values = noise[0].cumsum(2) / 3, noise[1]
    tokens = leaving(keys, dropped, seed, padding)
    merge = started(name, 2, 3).merge(tokens)
    assert merge.has_keys == (name != "cam")
    for row in range(2):
        for head in range(3):
            own = [x[row, head].double().numpy() for x in (keys, values)]
            stays, is_token = tokens.stays[row, head].numpy(), tokens.is_token[row, 0].numpy()
            attention = tokens.attention[row, head].double().numpy()
            if name == "cam":
                weights = (np.eye(60), cam(attention, stays, is_token))
            else:
                rule = {"look-m": look_m, "kvmerger": partial(kvmerger, attention=attention)}[name]
                weights = (rule(own[0], stays, is_token),) * 2
            for states, expected, weight in zip((keys, values), own, weights, strict=True):
                got = states if states is keys and not merge.has_keys else merge.of(states)
                torch.testing.assert_close(got[row, head], torch.from_numpy(weight @ expected).float(), **CLOSE)


@settings(deadline=None, max_examples=20)
@given(dropped=st.integers(1, 59), padding=st.sampled_from([0, 5, 59]), seed=st.integers(0, 2**16))
def test_runs_without_attention_join_the_nearest_token(dropped, padding, seed):
    noise = torch.randn(2, 2, 3, 60, 16, generator=torch.Generator().manual_seed(seed))
    keys, values = noise[0].cumsum(2) / 3, noise[1]
    tokens = replace(leaving(keys, dropped, seed, padding), attention=None)
    merged = started("kvmerger", 2, 3).merge(tokens).of(values)
    for row in range(2):
        for head in range(3):
            own = [x[row, head].double().numpy() for x in (keys, values)]
            weights = kvmerger(own[0], tokens.stays[row, head].numpy(), tokens.is_token[row, 0].numpy())
            torch.testing.assert_close(merged[row, head], torch.from_numpy(weights @ own[1]).float(), **CLOSE)


def test_values_without_attention_say_what_they_need(model):
    fault = "layer 0: merge: cam weighs by the attention .*, which the score keydiff does not look at; use the score"
    with pytest.raises(PolicyError, match=fault):
        teacher_forced(model, cache_of(model, merge="cam", score="keydiff"), TOKENS, [200])


@pytest.mark.parametrize("name", MERGES)
def test_the_count_of_bytes_knows_what_a_rule_keeps(name):
    assert 4 * kept_numbers(name, 3) == started(name, 1, 3).nbytes
    assert kept_numbers(None, 3) == 0 < OF_SEQUENCE


def test_many_dropped_tokens_are_compared_a_part_at_a_time(monkeypatch):
    tokens = leaving(torch.randn(1, 2, 64, 16), 40, seed=1)
    whole = tokens.nearest()
    monkeypatch.setattr("kvmix_cli.cache.merging.base.ROWS_AT_ONCE", 7)
    for one, other in zip(whole, tokens.nearest(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_merge_keeps_what_nothing_goes_into_bit_for_bit():
    keys = torch.randn(1, 1, 8, 16).bfloat16()
    merge = Merge.of_shares(
        LeavingTokens(keys, torch.tensor([[[False] + [True] * 7]]), 1, torch.ones(1, 1, 8).bool()),
        torch.tensor([[[3]]]),
        torch.tensor([[[1.0]]]),
    )
    assert merge.is_changed.flatten().tolist() == [False] * 3 + [True] + [False] * 4
    got = merge.of(keys)
    assert torch.equal(got[:, :, 4:], keys[:, :, 4:])
    torch.testing.assert_close(got[0, 0, 3], (keys[0, 0, 3].float() + keys[0, 0, 0].float()).mul(0.5).bfloat16())


TRANSFORMS = {
    "nothing else": None,
    "transforms": Transforms(k=(Center(), Balance(), Rotate()), v=(Balance(), Rotate(), Center())),
}


@pytest.mark.parametrize("transforms", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_model_stores_what_its_tokens_merge_to(model, states, transforms):
    """A prompt's flush, then one that is decoded: keys after RoPE and values as the model made them."""
    cache = cache_of(model, transforms=transforms)
    teacher_forced(model, cache, TOKENS, [160] + [1] * 40)
    layer, (keys, values) = cache.layers[0], states[0]  # later layers see what was dropped before them
    tiers = layer.stores[0].packing.view.tier
    assert tiers.shape[2] == 2 * FLUSH
    for row in range(2):
        for head in range(2):
            threshold = None
            for first in (0, FLUSH):
                places = slice(SINK + first, SINK + first + FLUSH)
                stays = (tiers[row, head, first : first + FLUSH] != EVICTED).numpy()
                own = [x[row, head, places].double().numpy() for x in (keys, values)]
                weights, threshold = d2o(own[0], stays, np.ones(FLUSH, bool), threshold)
                assert (weights[stays][:, ~stays] > 0).sum() > 5  # some are merged
                assert (weights[stays][:, ~stays].sum(0) == 0).sum() > 5  # and some are not
                kept = first // FLUSH * (FLUSH - DROPPED)
                for index, expected in enumerate(own):
                    stored = layer.restore(index, layer.stores[index].packing.view.held[0])
                    got = stored[row, head, kept : kept + FLUSH - DROPPED]
                    torch.testing.assert_close(
                        got.double(), torch.from_numpy((weights @ expected)[stays]), rtol=1e-3, atol=1e-4
                    )


def test_padding_takes_nothing_and_goes_nowhere(model):
    """Rows of a batch with 25 tokens of padding store what a prompt without padding merges them to."""
    padding = 25
    mask = left_padded(TOKENS, padding)
    unquantized, merged = unquantized_cache(model.config), cache_of(model, score="keydiff")
    for cache in (unquantized, merged):
        teacher_forced(model, cache, TOKENS, [190], mask)
    layer, view = merged.layers[0], merged.layers[0].stores[0].packing.view
    keys, is_token = unquantized.layers[0].keys, np.arange(FLUSH) >= padding - SINK
    for head in range(2):
        stays = (view.tier[0, head] != EVICTED).numpy()
        own = keys[0, head, SINK : SINK + FLUSH].double().numpy()
        assert (~stays & ~is_token).any()
        weights, _ = d2o(own, stays, is_token)
        got = layer.stores[0].packing.view.held[0][0, head].double()
        torch.testing.assert_close(got, torch.from_numpy((weights @ own)[stays]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["bool", "additive", "of one number", None])
def test_left_padding_is_what_the_newest_query_does_not_see_at_first(kind):
    mask = torch.ones(4, 7, dtype=torch.bool).tril(3).expand(2, 1, 4, 7).clone()
    mask[1, ..., :3] = False
    mask[0, ..., 4] = False  # a gap is no padding
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    mask = {"of one number": torch.ones(2, 1, 4, 1, dtype=torch.bool), None: None}.get(kind, mask)
    padding = left_padding(AttentionCall(torch.zeros(2, 3, 4, 8), 1.0, mask))
    assert padding.flatten().tolist() == ([0, 3] if kind in ("bool", "additive") else [0, 0])


@pytest.fixture(autouse=True)
def every_other(monkeypatch):
    class EveryOther(TokenScore):
        """Tokens at even places."""

        queries = "none"

        def importance(self, tokens):
            return (tokens.places % 2 == 0).float().expand(tokens.keys.shape[:3])

    monkeypatch.setattr(TOKEN_SCORES, "_entries", {**TOKEN_SCORES._entries, "every-other": EveryOther})


@pytest.mark.slow
def test_beams_and_batches(model):
    step = ids(2)[:, :1]
    one, other = (cache_of(model, 2, 4) for _ in range(2))
    with torch.no_grad():
        model(TOKENS[:, :155], past_key_values=one)
        swap_by_beams(one)
        model(TOKENS[:, :155].flip(0), past_key_values=other)
        for _ in range(25):  # past a flush, whose threshold is of each sequence
            logits = [model(step, past_key_values=cache).logits for cache in (one, other)]
            torch.testing.assert_close(*logits)
    generated = model.generate(TOKENS[:, :155], past_key_values=cache_of(model, 2, 4), num_beams=2, max_new_tokens=3)
    assert generated.shape == (2, 158)


@pytest.mark.slow
def test_the_last_forward_can_be_taken_back_and_what_was_merged_cannot(model):
    rolled_back, straight = cache_of(model, 2, 4), cache_of(model, 2, 4)
    with torch.no_grad():
        for cache in (rolled_back, straight):
            model(TOKENS[:, :140], past_key_values=cache)
        model(TOKENS[:, 140:170], past_key_values=rolled_back)
        rolled_back.crop(-15)
        model(TOKENS[:, 140:155], past_key_values=straight)
        for _ in range(25):
            logits = [model(ids(2)[:, :1], past_key_values=cache).logits for cache in (rolled_back, straight)]
            torch.testing.assert_close(*logits)
    with pytest.raises(PlanError, match="a token policy has evicted 64 of 160; use a policy without `evict`"):
        rolled_back.crop(-150)


def test_merging_needs_to_be_shown_the_mask(model):
    other = build("llama", wide=True)
    other.set_attn_implementation("sdpa")
    cache = cache_of(other, score="keydiff")
    other(TOKENS, past_key_values=cache)
    with pytest.raises(PolicyError, match=r"layer 0: the plan needs the model's queries.*attn_implementation='kvmix'"):
        other(TOKENS, past_key_values=cache)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"weigh": True, "keep": 512}, "weigh is of a share that is dropped of all tokens; add evict, without keep"),
        ({"weigh": True, "evict": 0.5, "when": "prompt"}, "add evict, without keep and when: prompt"),
        ({"merge": "d2o", "tiers": [{"share": 0.5, "k": 8, "v": 8}]}, "d2o is of a share of tokens that are dropped"),
        ({"merge": "d2o", "keep": 512}, "add evict, without keep"),
    ],
)
def test_what_drops_no_share_merges_nothing(given, fault):
    with pytest.raises(ValueError, match=fault):
        CacheSettings.model_validate({"page": 64, "tokens": {"flush": 128, **given}})


def test_an_unknown_rule_is_one_line(model):
    with pytest.raises(PlanError, match=r"unknown rule to merge tokens 'd20' \(did you mean 'd2o'\?\); known are"):
        teacher_forced(model, cache_of(model, merge="d20"), TOKENS, [200])


def test_a_layer_that_drops_nothing_merges_nothing():
    given = policy(tiers=(Tier(share=0.2, k=16, v=16),), weigh=True)
    whole, half = (given.of_layer(TokenShares(evict=share)) for share in (0.0, 0.2))
    assert (whole.merge, whole.log_weight) == (None, 0.0)
    assert (half.merge, half.log_weight) == ("d2o", pytest.approx(math.log(0.8 / 0.6)))
    assert given.log_weight == pytest.approx(math.log(2))


def test_of_two_equal_tokens_one_that_counts_for_both_is_as_good(model):
    """Every key and value comes twice, one of the two is dropped: attention is that of all of them."""
    states = torch.randn(2, 2, 2, FLUSH, 16).repeat_interleave(2, dim=3)
    query, end = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 2, 20, 16)
    answers = []
    for more in ({}, {"evict": 0.5, "merge": None, "weigh": True, "flush": 160, "score": "every-other"}):
        axes = {"tokens": policy(**more)} if more else {}
        cache = MixedCache.from_plan(plan_for(model, axes, sink=0), model.config)
        cache.update(*states, 0)
        key, value = cache.update(*end, 0)
        segments = [each.segments if isinstance(each, Handle) else Segments(None, None, each) for each in (key, value)]
        answers.append(attend(AttentionProblem(query, *segments, 0.25)))
    for got, expected in zip(*reversed(answers), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
