"""Transforms, tiers and channel groups in whole models: exact at 16 bits, the same on every path."""

import functools

import pytest
import torch
from architectures import CONFIGS, NO_KVMIX_ATTENTION, build, case, implementations
from composing import AXES, plan_for, quantized
from hypothesis import given, settings
from hypothesis import strategies as st
from teaching import ids, left_padded, swap_by_beams, takes_back_without_a_trace, teacher_forced

from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.cache.policies import TOKEN_SCORES, TokenScore
from kvmix_cli.cache.store import ROLLBACK
from kvmix_cli.errors import PlanError, PolicyError
from kvmix_cli.plan.channels import ChannelGroup, ChannelPolicy
from kvmix_cli.plan.tokens import Tier, TokenPolicy

WITHOUT_QUERIES = ("rotated", "centered", "recency", "before rope")
SHIFTED = ("centered", "all of them")
CANNOT_BE_CENTERED = {"gemma2", "gpt_oss"}
STEPS = [90] + [1] * 5 + [70, 5, 1]


COMBINED = ("all of them", "before rope", "queries to come", "everything")
"""Axes that have the parts of the others, and those that turn keys back as each family does it."""
ALONE = {"llama", *CANNOT_BE_CENTERED, *NO_KVMIX_ATTENTION}
"""Families that get each of the axes alone, too: one of the usual kind, and those that not all of them fit."""
CASES = [(family, axes) for family in CONFIGS for axes in AXES if family in ALONE or axes in COMBINED]
CASES = [each for each in CASES if each[0] not in NO_KVMIX_ATTENTION or each[1] in WITHOUT_QUERIES]


@functools.cache
def unquantized_logits(family, padding):
    """What the stock cache answers, once for all axes: it knows none of them."""
    model = build(family, wide=True)
    model.set_attn_implementation(implementations(family)[-1])
    tokens = ids(sum(STEPS))
    return teacher_forced(model, unquantized_cache(model.config), tokens, STEPS, left_padded(tokens, padding))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "axes"), [case(*each) for each in CASES])
def test_at_16_bits_nothing_changes(family, axes):
    model = build(family, wide=True)
    model.set_attn_implementation(implementations(family)[-1])
    tokens = ids(sum(STEPS))
    plan = plan_for(model, AXES[axes])
    if axes in SHIFTED and family in CANNOT_BE_CENTERED:
        with pytest.raises(PolicyError, match=r"soft-caps|sink logits"):
            model(tokens, past_key_values=MixedCache.from_plan(plan, model.config))
        return
    for padding in (0, 25) if family == "llama" else (25,):  # of the first of two rows
        mask = left_padded(tokens, padding)
        expected = unquantized_logits(family, padding)
        got = teacher_forced(model, MixedCache.from_plan(plan, model.config), tokens, STEPS, mask)
        torch.testing.assert_close(got[0, padding:], expected[0, padding:], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["rotated", "recency", "before rope", "everything"])
def test_other_attention_reads_the_same(axes):
    """What looks at no queries runs under any implementation: handles give the model's own numbers back."""
    axes = dict(AXES[axes])
    if axes.get("tokens") and axes.get("channels"):
        axes |= {"transforms": AXES["rotated"]["transforms"]}
        axes |= {"tokens": TokenPolicy(score="recency", tiers=(Tier(share=0.2, k=8, v=8),), flush=80)}
    model = build("llama", wide=True)
    tokens, logits = ids(sum(STEPS)), []
    for implementation in ("sdpa", "kvmix"):
        model.set_attn_implementation(implementation)
        cache = MixedCache.from_plan(plan_for(model, axes, 2, 4), model.config)
        logits.append(teacher_forced(model, cache, tokens, STEPS, left_padded(tokens, 25)))
        assert cache.attended.share > 0
    torch.testing.assert_close(logits[1][1], logits[0][1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits[1][0, 25:], logits[0][0, 25:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_attention_that_shows_no_queries_is_a_named_error(family):
    model = build(family)
    model.set_attn_implementation("sdpa")
    cache = MixedCache.from_plan(plan_for(model, AXES["attention"], 2, 2), model.config)
    tokens = ids(30)
    model(tokens, past_key_values=cache)
    with pytest.raises(PolicyError, match=r"layer 0: the plan needs the model.s queries.*attn_implementation='kvmix'"):
        model(tokens, past_key_values=cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", ["attention", "normalised", "last queries", "queries to come", "query-range", "everything"]
)
def test_beams_and_batches(axes):
    model = build("llama", wide=True)
    model.set_attn_implementation("kvmix")
    plan = plan_for(model, quantized(axes), 2, 4)
    tokens, step = ids(120), ids(10)
    one, other = (MixedCache.from_plan(plan, model.config) for _ in range(2))
    with torch.no_grad():
        model(tokens, past_key_values=one)
        swap_by_beams(one)
        model(tokens.flip(0), past_key_values=other)
        for _ in range(10):  # past a flush
            logits = [model(step, past_key_values=cache).logits for cache in (one, other)]
            torch.testing.assert_close(*logits)
    cache = MixedCache.from_plan(plan, model.config)
    assert model.generate(tokens, past_key_values=cache, num_beams=3, max_new_tokens=12).shape == (2, 132)


@pytest.mark.slow
@given(
    axes=st.sampled_from(["attention", "normalised", "last queries", "before rope", "query-range", "everything"]),
    steps=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=6),
    prompt=st.sampled_from([20, 60]),
)
@settings(max_examples=15, deadline=None)
def test_taking_back_part_of_the_last_forward_leaves_no_trace(axes, steps, prompt):
    model = TAKING_BACK
    plan = plan_for(model, quantized(axes), 2, 4)
    rolled_back, straight = (MixedCache.from_plan(plan, model.config) for _ in range(2))
    takes_back_without_a_trace(model, rolled_back, straight, prompt, steps)
    assert rolled_back.nbytes == straight.nbytes


TAKING_BACK = build("llama", wide=True)
TAKING_BACK.set_attn_implementation("kvmix")


@pytest.mark.parametrize("axes", ["attention", "everything"])
def test_going_back_into_what_is_sorted_opens_all_tiers(axes):
    model = TAKING_BACK
    tokens = ids(300)
    cache, fresh = MixedCache.from_plan(plan_for(model, AXES[axes]), model.config), unquantized_cache(model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        cache.crop(-(ROLLBACK + 150))
        assert cache.get_seq_length() == 300 - ROLLBACK - 150
        model(tokens[:, : 300 - ROLLBACK - 150], past_key_values=fresh)
        logits = [model(ids(120, seed=3), past_key_values=each).logits for each in (cache, fresh)]
        torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6)
        logits = [model(ids(1, seed=4), past_key_values=each).logits for each in (cache, fresh)]
    torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6)


def evicting(model, share=0.75, sink=4):
    return plan_for(model, {"tokens": TokenPolicy(evict=share, flush=64)}, sink=sink)


def test_evicted_tokens_are_neither_stored_nor_attended_to():
    model = TAKING_BACK
    cache = MixedCache.from_plan(evicting(model), model.config)
    with torch.no_grad():
        model(ids(4 + 64 + 10), past_key_values=cache)
        model(ids(1), past_key_values=cache)
    key = cache.layers[0].stores[0].segments()
    assert (key.shape[2], key.kept_tokens) == (4 + 64 + 10 + 1, 4 + 16 + 10 + 1)
    everything = 2 * 2 * 2 * 32 * 8 * key.kept_tokens * 4
    assert everything < cache.nbytes < 1.05 * everything
    assert cache.attended.quantized == 0
    assert cache.attended.total == 4 * 2 * (78 * 79 / 2 + 31)
    with pytest.raises(PlanError, match=r"layer 0 keys: the cache cannot go back .* evicted"):
        cache.crop(-20)
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), pytest.raises(PolicyError, match="evicted"):
        for layer in cache.layers:
            layer._unseen = False
        model(ids(1), past_key_values=cache)
    model.set_attn_implementation("kvmix")


def test_eviction_is_a_mask_over_what_attention_said():
    """What is attended to after eviction is what a full cache attends to with the evicted tokens masked."""
    model = build("llama", wide=True)
    model.set_attn_implementation("kvmix")
    model.config.num_hidden_layers = 1
    model.model.layers = model.model.layers[:1]
    plan = evicting(model, sink=0)
    cache, full = MixedCache.from_plan(plan, model.config), unquantized_cache(model.config)
    tokens, step = ids(64 + 10, batch=1), ids(1, batch=1)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        got = model(step, past_key_values=cache).logits
        model(tokens, past_key_values=full)
        gone = cache.layers[0]._tokens.sorted.view == 255
        assert gone.sum(-1).tolist() == [[48, 48]]
        mask = torch.ones(1, 2, 1, tokens.shape[1] + 1, dtype=torch.bool)
        mask[:, :, 0, :64] = ~gone
        expected = model(step, past_key_values=full, attention_mask=mask).logits
    torch.testing.assert_close(got, expected)


def test_a_score_of_ones_own(monkeypatch):
    monkeypatch.setattr(TOKEN_SCORES, "_entries", dict(TOKEN_SCORES._entries))  # forgotten after the test

    @TOKEN_SCORES.register("test-first")
    class First(TokenScore):
        queries = "none"

        def importance(self, tokens):
            return -torch.arange(tokens.keys.shape[2]).expand(tokens.keys.shape[:3])

    model = TAKING_BACK
    axes = {"tokens": TokenPolicy(score="test-first", tiers=(Tier(share=0.25, k=8, v=8),), flush=64)}
    cache = MixedCache.from_plan(plan_for(model, axes, 2, 2), model.config)
    with torch.no_grad():
        model(ids(4 + 64 + 10 + ROLLBACK), past_key_values=cache)
    assert cache.layers[0]._tokens.sorted.view[0, 0].tolist() == [0] * 16 + [1] * 48


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tokens": TokenPolicy(score="atention", evict=0.5, flush=32)}, r"unknown token score 'atention' \(did you"),
        (
            {"channels": ChannelPolicy(score="qrange", runs=(ChannelGroup(channels=16, bits=4),))},
            "unknown channel score 'qrange'",
        ),
    ],
)
def test_unknown_scores(axes, message):
    model = TAKING_BACK
    with pytest.raises(PlanError, match=message):
        model(ids(10), past_key_values=MixedCache.from_plan(plan_for(model, axes, 2, 2), model.config))
