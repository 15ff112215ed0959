"""Queries that wait: what is learned from them together is what would have been learned one by one."""

from dataclasses import replace
from unittest.mock import ANY

import pytest
import torch
from architectures import build
from coding import PAGE, coded_plan
from teaching import ids

from kvmix_cli.cache import queued
from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.cache.observation import AttentionCall
from kvmix_cli.cache.queued import QueryQueue, QueuedCall
from kvmix_cli.cache.statistics import RunningMean


def call(value, queries=1, scaling=1.0, mask=None):
    """A call whose query and logarithms are all `value`."""
    query, logarithms = torch.full((1, 2, queries, 4), value), torch.full((1, 2, queries), value)
    return AttentionCall(query, scaling, mask=mask, logarithms=logarithms)


def queue_of(*values):
    """A queue that holds calls of one query each."""
    queue, first = QueryQueue(), QueuedCall(call(0.0), torch.empty(1, 1, 0, 4), 0, 0)
    assert queue.add(first) == [replace(first, call=ANY)]
    for tokens, value in enumerate(values):
        assert queue.add(QueuedCall(call(value), torch.empty(1, 1, tokens, 4), tokens, tokens)) == []
    return queue


def test_the_last_call_stays_by_itself_and_those_before_it_are_one():
    queue = queue_of(1.0, 2.0, 3.0)
    assert queue.nbytes == 3 * 4 * (2 * 4 + 2)
    earlier, last = queue.take()
    assert earlier.call.query[0, 0, :, 0].tolist() == earlier.call.logarithms[0, 0].tolist() == [1, 2]
    assert (earlier.tokens, earlier.keys.shape[2]) == (1, 1)
    assert last.call.query.unique().tolist() == [3]
    assert queue.take() == []


@pytest.mark.parametrize(
    "other",
    [
        call(9.0, queries=5),
        call(9.0, mask=torch.ones(1, 1, 1, 3, dtype=torch.bool)),
        AttentionCall(torch.ones(1, 2, 1, 4), 1.0),
    ],
    ids=["several queries", "a mask", "no logarithms"],
)
def test_what_cannot_wait_comes_after_what_waited(other):
    learned = queue_of(1.0, 2.0).add(QueuedCall(other, torch.empty(1, 1, 3, 4), 3, 3))
    assert [each.call.query.shape[2] for each in learned] == [1, 1, other.query.shape[2]]
    assert learned[2].call.mask is other.mask


def test_calls_that_are_scored_otherwise_are_not_put_together():
    queue = queue_of(1.0, 2.0)
    learned = queue.add(QueuedCall(call(3.0, scaling=0.5), torch.empty(1, 1, 3, 4), 3, 3))
    assert [each.call.query.unique().tolist() for each in learned] == [[1], [2]]
    assert [each.call.scaling for each in queue.take()] == [0.5]


def decoded(model, plan, at_once, changes, monkeypatch):
    """Logits of 60 decoding steps, and the places that are exact then in every layer."""
    monkeypatch.setattr(queued, "AT_ONCE", at_once)
    cache, seen = MixedCache.from_plan(plan, model.config), []
    with torch.no_grad():
        model(ids(90), past_key_values=cache)
        for step in range(60):
            seen.append(model(ids(1, seed=step), past_key_values=cache).logits)
            changes.get(step, lambda cache: None)(cache)
    return torch.cat(seen, dim=1), [layer.stores[0].segments().packed.places for layer in cache.layers]


CHANGES = {
    5: lambda cache: cache.crop(-1),
    17: lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    31: lambda cache: cache.crop(-3),
    44: lambda cache: cache.crop(-PAGE - 20),
}


@pytest.mark.parametrize("changes", [{}, CHANGES], ids=["straight", "changed"])
def test_the_same_tokens_become_exact(changes, monkeypatch, tmp_path):
    model = build("llama")
    model.set_attn_implementation("kvmix")
    plan = coded_plan(model, tmp_path, exact=2, rope=1 / 10_000 ** (torch.arange(8) / 8))
    one_by_one, together = (decoded(model, plan, at_once, changes, monkeypatch) for at_once in (1, 16))
    assert all(map(torch.equal, one_by_one[1], together[1]))
    torch.testing.assert_close(one_by_one[0], together[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 4], [6, 1]])
def test_a_running_mean_does_not_depend_on_how_queries_come(sizes):
    rows = torch.rand(1, 2, 7, 5)
    mean = RunningMean(8, torch.zeros(1, 2, 5))
    for part in rows.split(sizes, dim=2):
        mean.add(part, 1)
    expected = torch.zeros(1, 2, 5, dtype=torch.float64)
    for row in range(7):
        expected += (rows[:, :, row].double() - expected) / 8
    torch.testing.assert_close(mean.mean.double(), expected, rtol=0, atol=1e-6)
    mean.take_back(1)
    torch.testing.assert_close(mean.mean.double(), (expected - rows[:, :, 6].double() / 8) / (7 / 8), rtol=0, atol=1e-6)


def test_a_row_of_many_queries_counts_as_all_of_them():
    mean = RunningMean(8, torch.zeros(1, 1, 1))
    mean.add(torch.full((1, 1, 1, 1), 300.0), 300)
    torch.testing.assert_close(mean.mean, torch.ones(1, 1, 1))
