"""Scores of tokens against their formulas in float64, and what they are given in real models."""

import itertools
import weakref
from copy import deepcopy

import numpy as np
import pytest
import torch
from architectures import build
from composing import AXES, plan_for
from hypothesis import given, settings
from hypothesis import strategies as st
from teaching import ids

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.cache.observation import AttentionCall, QuerySample, TailAttention, weight_rows
from kvmix_cli.cache.policies import TOKEN_SCORES, Candidates, TokenScore, token_score
from kvmix_cli.cache.rotary import rotations_of
from kvmix_cli.cache.statistics import LastRows, QuerySum
from kvmix_cli.errors import PolicyError
from kvmix_cli.plan.token_scores import statistics_of
from kvmix_cli.plan.tokens import Tier, TokenPolicy
from kvmix_cli.plan.transforms import Rotate, Transforms

MODEL = build("llama", wide=True)
MODEL.set_attn_implementation("kvmix")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""Scores are float32; references are float64."""


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def candidates(count=48, **more):
    return Candidates(normal(2, 3, count, 16), normal(2, 3, count, 8, seed=1), **more)


def ranking(name, tokens, granularity=1):
    return token_score(name).ranking(tokens, granularity)


def every_head(tokens, formula):
    """Apply a formula of NumPy to the keys `[n, D]` of every head, in float64."""
    keys = tokens.keys.double().numpy()
    return torch.from_numpy(np.array([[formula(head) for head in row] for row in keys])).float()


@pytest.mark.parametrize("name", TOKEN_SCORES)
def test_the_count_of_bytes_knows_what_a_score_keeps(name):
    assert TOKEN_SCORES[name].statistics() == statistics_of(name)


def test_keydiff():
    def formula(keys):
        unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        mean = unit.mean(0)
        return -unit @ mean / np.linalg.norm(mean)

    tokens = candidates()
    torch.testing.assert_close(ranking("keydiff", tokens), every_head(tokens, formula), **CLOSE)


def test_leverage_is_the_diagonal_of_the_projection():
    def formula(keys):
        x = keys - keys.mean(0)
        ridge = 1e-3 * np.square(x).sum(0).mean()
        scores = np.diag(x @ np.linalg.inv(x.T @ x + ridge * np.eye(x.shape[1])) @ x.T)
        padded = np.pad(scores, 3, constant_values=-np.inf)
        return [padded[at : at + 7].max() for at in range(len(scores))]

    tokens = candidates()
    torch.testing.assert_close(ranking("leverage", tokens), every_head(tokens, formula), **CLOSE)


def test_leverage_of_equal_keys_is_finite():
    assert ranking("leverage", Candidates(torch.ones(1, 1, 16, 8), torch.ones(1, 1, 16, 8))).isfinite().all()


def test_key_norm():
    tokens = candidates()
    formula = lambda keys: -np.linalg.norm(keys, axis=1)  # noqa: E731
    torch.testing.assert_close(ranking("key-norm", tokens), every_head(tokens, formula), **CLOSE)


def test_expected_attention():
    tokens = candidates(queries=normal(2, 3, 20, 16, seed=2), scaling=0.25)
    logits = 0.25 * torch.einsum("bhrd,bhnd->bhrn", tokens.queries.double(), tokens.keys.double())
    expected = (logits.mean(2) + logits.var(2, correction=0) / 2).softmax(-1) * tokens.values.double().norm(dim=-1)
    torch.testing.assert_close(ranking("expected-attention", tokens), expected.float(), **CLOSE)


def test_pooling_and_sharing():
    weights = normal(1, 2, 16).abs()
    tokens = Candidates(normal(1, 2, 16, 8), normal(1, 2, 16, 8), attention=weights)
    padded = torch.nn.functional.pad(weights, (2, 2))
    torch.testing.assert_close(ranking("snapkv", tokens), padded.unfold(2, 5, 1).mean(-1), **CLOSE)
    torch.testing.assert_close(ranking("tova", tokens), weights.mean(1, keepdim=True).expand_as(weights), **CLOSE)
    of_four = weights.unflatten(2, (4, 4)).mean(-1).repeat_interleave(4, dim=2)
    torch.testing.assert_close(ranking("attention", tokens, granularity=4), of_four, **CLOSE)


def test_random_depends_on_the_place_alone():
    whole = ranking("random", candidates(96, start=10, layer=3))
    part = ranking("random", candidates(48, start=58, layer=3))
    assert torch.equal(whole[:, :, 48:], part)
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert len(whole[0].unique()) == 3 * 96


def test_crushed_tokens_have_representatives():
    weights = normal(1, 2, 64).abs()
    tokens = Candidates(normal(1, 2, 64, 8), normal(1, 2, 64, 8), kept=32, attention=weights)
    scores = ranking("kvcrush", tokens)
    best = weights.topk(24, dim=-1).indices
    chosen = scores.topk(32, dim=-1).indices
    assert all(set(b.tolist()) <= set(c.tolist()) for b, c in zip(best[0], chosen[0], strict=True))
    others = [set(c.tolist()) - set(b.tolist()) for b, c in zip(best[0], chosen[0], strict=True)]
    plain = [set(w.topk(32).indices.tolist()) - set(b.tolist()) for w, b in zip(weights[0], best[0], strict=True)]
    assert others != plain  # not the next by attention


def coverage(keys, chosen):
    unit = torch.nn.functional.normalize(keys, dim=-1)
    return (unit @ unit[chosen].mT).clamp(min=0).amax(-1).sum()


def test_greedy_tokens_stand_for_the_others():
    centres = torch.nn.functional.normalize(normal(8, 16), dim=-1)
    keys = (centres.repeat_interleave(torch.tensor([50, 2, 2, 2, 2, 2, 2, 2]), dim=0) + 0.01 * normal(64, 16))[
        None, None
    ]
    tokens = Candidates(keys, keys, kept=8, attention=torch.ones(1, 1, 64))
    chosen = ranking("bumblebee", tokens)[0, 0].topk(8).indices
    assert len(chosen.unique()) == 8
    assert coverage(keys[0, 0], chosen) > 1.1 * coverage(keys[0, 0], torch.arange(8))


def walked(keys, values, is_there, chances):
    """Signs of BalanceKV's walk, in loops of float64."""
    x = keys - keys.mean(0)
    kernel = np.exp(x @ x.T / np.sqrt(x.shape[1])) * (values @ values.T + 0.025)
    signs = np.zeros(len(keys))
    for i in range(len(keys)):
        chance = 0.5 - sum(signs[j] * kernel[i, j] for j in range(i)) / (2 * kernel[i, i])
        signs[i] = is_there[i] * (1 if chances[i] < chance else -1)
    return signs


def test_balanced_halves_stay_as_many_rounds_as_their_walks_say():
    tokens = candidates(kept=12)
    scores, rounds = ranking("balancekv", tokens), 2
    chances = torch.rand(rounds + 1, 3, 48, generator=torch.Generator().manual_seed(0)).double().numpy()
    for row, head in itertools.product(range(2), range(3)):
        keys, values = (x[row, head].double().numpy() for x in (tokens.keys, tokens.values))
        stays, expected = np.ones(48, bool), chances[0, head].copy()
        for number in range(rounds):
            stays = stays & (walked(keys, values, stays, chances[number + 1, head]) > 0)
            expected += stays
        np.testing.assert_allclose(scores[row, head].numpy(), expected, rtol=1e-5)


def test_halves_balance_better_than_chance():
    """Of keys in clusters: twice what attention reads of the half that stays is nearer to all than of a random half."""
    clusters = normal(2, 3, 8, 32, seed=3).repeat_interleave(64, dim=2)[:, :, normal(512).argsort()]
    keys, values = (clusters + 0.3 * normal(2, 3, 512, 32)).split(16, dim=-1)
    tokens, queries = Candidates(keys, values, kept=256), normal(2, 3, 64, 16, seed=2)
    weights = (queries @ tokens.keys.mT / 4).exp()
    off = {}
    for name in ("balancekv", "random"):
        stays = ranking(name, tokens).argsort(-1, descending=True).argsort(-1) < 256
        off[name] = ((weights * (2 * stays[:, :, None] - 1.0)) @ tokens.values).norm()
    assert off["balancekv"] < 0.5 * off["random"]


def test_centres_are_far_from_each_other():
    def formula(keys):
        turns, distance = np.full(len(keys), -12.0), np.linalg.norm(keys - keys.mean(0), axis=1)
        for turn in range(12):
            best = int(np.argmax(np.where(turns > -12, -1, distance)))
            turns[best] = -turn
            new = np.linalg.norm(keys - keys[best], axis=1)
            distance = new if turn == 0 else np.minimum(distance, new)
        return turns

    tokens = candidates(kept=12)
    torch.testing.assert_close(ranking("subgen", tokens), every_head(tokens, formula), **CLOSE)


@pytest.mark.parametrize("name", ["balancekv", "subgen"])
def test_samples_are_of_each_block(name):
    """320 tokens are two blocks of 160."""
    tokens = candidates(320, kept=160)
    whole, first = ranking(name, tokens), Candidates(tokens.keys[:, :, :160], tokens.values[:, :, :160], kept=80)
    chosen = whole.argsort(-1, descending=True).argsort(-1) < 160
    assert (chosen[:, :, :160].sum(-1) > 50).all()
    assert (chosen[:, :, 160:].sum(-1) > 50).all()
    if name == "subgen":
        torch.testing.assert_close(whole[:, :, :160], ranking(name, first))


class Spy(TokenScore):
    """Keeps copies of what it is given: the tail's memory is used again."""

    queries = "none"
    before_rope = True
    seen: list = []  # noqa: RUF012 - emptied by each test

    def importance(self, tokens):
        self.seen.append((tokens.layer, tokens.start, tokens.keys_before_rope.clone(), tokens.values.clone()))
        return tokens.places.float().expand(tokens.keys.shape[:3])


@pytest.fixture
def spy(monkeypatch):
    monkeypatch.setattr(TOKEN_SCORES, "_entries", {**TOKEN_SCORES._entries, "spy": Spy})
    monkeypatch.setattr(Spy, "seen", [])
    return Spy


@pytest.mark.parametrize("transforms", [None, Transforms(k=(Rotate(),), v=(Rotate(seed=3),))])
def test_candidates_are_the_models_own_keys_and_values(spy, transforms):
    """Of a prompt and of decoded tokens: what the projections make, with the rotation undone."""
    axes = {"tokens": TokenPolicy(score="spy", evict=0.5, flush=32), "transforms": transforms}
    cache = MixedCache.from_plan(plan_for(MODEL, axes, 4, 4, sink=4), MODEL.config)
    made = {}
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda _, __, out, key=(index, name): made.setdefault(key, []).append(out)
        )
        for index, layer in enumerate(MODEL.model.layers)
        for name in ("k_proj", "v_proj")
    ]
    try:
        with torch.no_grad():
            MODEL(ids(120, batch=1), past_key_values=cache)
            for step in range(2):
                MODEL(ids(40, batch=1, seed=step), past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()
    assert len({start for _, start, *_ in spy.seen}) > 1
    for layer, start, keys, values in spy.seen:
        part = slice(start, start + keys.shape[2])
        for name, found in (("k_proj", keys), ("v_proj", values)):
            whole = torch.cat(made[layer, name], dim=1).unflatten(2, (-1, 32)).transpose(1, 2)
            torch.testing.assert_close(found, whole[:, :, part], rtol=1e-5, atol=1e-5)  # angles are float32 in models


def test_a_model_that_is_not_known_is_a_named_error():
    plan = plan_for(MODEL, AXES["before rope"])
    with pytest.raises(PolicyError, match=r"`leverage` reads keys before RoPE.*load_model.*know_rotations"):
        MixedCache.from_plan(plan, deepcopy(MODEL.config))
    assert set(rotations_of(MODEL.config, "x")) == set(range(4))


@pytest.mark.parametrize(("returned", "message"), [(lambda t: t.keys, "returned .* expected"), (None, "is NaN")])
def test_scores_that_cannot_be_used_are_named(spy, monkeypatch, returned, message):
    nothing = lambda tokens: torch.full(tokens.keys.shape[:3], torch.nan)  # noqa: E731
    monkeypatch.setattr(Spy, "importance", lambda self, tokens: (returned or nothing)(tokens))
    axes = {"tokens": TokenPolicy(score="spy", evict=0.5, flush=32)}
    cache = MixedCache.from_plan(plan_for(MODEL, axes, 4, 4), MODEL.config)
    with torch.no_grad(), pytest.raises(PolicyError, match=f"layer 0: the score Spy {message}"):
        MODEL(ids(150), past_key_values=cache)


def test_chunks_stay_together():
    policy = TokenPolicy(score="attention", tiers=(Tier(share=0.25, k=8, v=8),), evict=0.25, flush=64, granularity=8)
    cache = MixedCache.from_plan(plan_for(MODEL, {"tokens": policy}, 4, 4), MODEL.config)
    with torch.no_grad():
        MODEL(ids(220), past_key_values=cache)
    tiers = cache.layers[0]._tokens.sorted.view.unflatten(2, (-1, 8))
    assert tiers.shape[2] >= 8
    assert (tiers == tiers[..., :1]).all()
    assert list(TokenPolicy(evict=0.5, flush=64, granularity=5).faults(16)) == [
        "granularity must be a divisor of the page of 16 tokens, got 5"
    ]


def reference_rows(call, keys):
    """Return causal weights `[B, H_kv, G, S, n]` in float64."""
    grouped = call.query.double().unflatten(1, (keys.shape[1], -1))
    scores = call.scaling * torch.einsum("bhgsd,bhnd->bhgsn", grouped, keys.double())
    count = scores.shape[-2]
    scores = scores.masked_fill(torch.ones(count, keys.shape[2]).triu(keys.shape[2] - count + 1).bool(), -torch.inf)
    return scores.softmax(-1)


@pytest.mark.parametrize("queries", [5, 100])
@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("sample", [QuerySample(every=True), QuerySample(recent=7, spread=0)])
def test_rows_of_all_queries_and_of_the_last(queries, reduce, sample):
    call, keys = AttentionCall(normal(2, 4, queries, 16), 0.3), normal(2, 2, 110, 16, seed=5)
    rows = weight_rows(call, keys, 110, True, sample, reduce).weights
    expected = reference_rows(call, keys)[..., -(queries if sample.every else min(7, queries)) :, :]
    found = rows.sum(2) if reduce == "sum" else rows.amax(2)
    wanted = expected.sum((2, 3)) if reduce == "sum" else expected.amax((2, 3))
    torch.testing.assert_close(found, wanted.float(), **CLOSE)


@pytest.mark.parametrize("near", [1, 6, 40])
@pytest.mark.parametrize("cuts", [(), (9, 10, 11, 80)])
def test_near_queries_do_not_count(near, cuts):
    """The mean weight of queries at least `near` tokens later, however the queries were fed."""
    tokens, tail = 100, 30
    call, keys = AttentionCall(normal(1, 4, tokens, 16), 0.3), normal(1, 2, tokens, 16, seed=5)
    attention = TailAttention(QuerySample(every=True), near=near)
    for start, stop in itertools.pairwise((0, *cuts, tokens)):
        part = AttentionCall(call.query[:, :, start:stop], 0.3)
        attention.learn(part, keys[:, :, :stop], stop, stop)
    attention.forget_oldest(tokens - tail)
    far = torch.ones(tokens, tokens).tril(-near).bool()
    weights = reference_rows(call, keys).sum(2).masked_fill(~far, 0).sum(2)[..., tokens - tail :]
    expected = weights / far.sum(0)[tokens - tail :].clamp(min=1)
    torch.testing.assert_close(attention.rates(tail), expected.float(), **CLOSE)
    assert (attention.rates(tail)[..., max(0, tail - near) :] == 0).all()


@given(
    steps=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=6),
    reduce=st.sampled_from(["sum", "max"]),
    count=st.integers(1, 6),
)
@settings(max_examples=30, deadline=None)
def test_statistics_of_forwards_that_are_taken_back(steps, reduce, count):
    """Tokens grow from one forward to the next; of the last forward, rows can be taken back."""
    last, every, kept, width = LastRows(count, reduce), QuerySum(reduce), [], 3
    for seed, (rows, back) in enumerate(steps):
        width += rows
        new = normal(1, 2, rows, width, seed=seed).abs()
        last.add(new)
        every.add(new)
        back = min(back, rows - 1)
        last.take_back(back)
        every.take_back(back)
        kept += list(new[:, :, : rows - back].unbind(2))
    padded = torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[-1])) for row in kept], dim=2)
    reduced = (lambda rows: rows.sum(2)) if reduce == "sum" else (lambda rows: rows.amax(2))
    torch.testing.assert_close(last.total, reduced(padded[:, :, -count:]))
    torch.testing.assert_close(every.total, reduced(padded))


@pytest.mark.parametrize("rows", [QuerySum(), LastRows(16, "sum")], ids=["sum", "last"])
def test_columns_that_are_forgotten_take_no_memory(rows):
    whole = np.ones((1, 2, 8, 500), dtype=np.float32)
    memory = weakref.ref(whole)
    rows.add(torch.from_numpy(whole))
    del whole
    assert memory() is not None
    rows.narrow(490)
    assert memory() is None
    assert rows.total.shape == (1, 2, 10)
