"""Exact tokens against the plainest choice there is: sort what is exact and what is new, keep the best."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels.transform_layout import LEAST_PAGES, exact_count

from kvmix_cli.cache.tokens.exact import ExactTokens

BATCH, HEADS, PAGE, WIDTHS = 2, 2, 4, {"key": 3, "value": 5}


class Lists:
    """The exact tokens of one batch row and head, `place: score`."""

    def __init__(self, count):
        self.count, self.pages, self.held = count, 0, {}

    def add(self, scores):
        new = {self.pages * PAGE + place: score for place, score in enumerate(scores)}
        self.pages += len(scores) // PAGE
        many = self.count * max(self.pages, LEAST_PAGES)
        best = sorted(self.held | new, key=(self.held | new).get, reverse=True)[:many]
        self.held = {place: (self.held | new)[place] for place in best}

    def truncate(self, pages):
        self.pages = pages
        self.held = {place: score for place, score in self.held.items() if place < pages * PAGE}


steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 3)),
        st.tuples(st.just("cut"), st.integers(0, 3)),
        st.tuples(st.just("swap"), st.just(0)),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.slow
@given(count=st.integers(1, 3), steps=steps, kinds=st.sampled_from([("key",), ("value",), ("key", "value")]))
@settings(max_examples=60, deadline=None)
def test_the_best_of_all_pages_are_exact(count, steps, kinds):
    torch.manual_seed(0)
    exact = ExactTokens(count, torch.empty(BATCH, HEADS, 0, 1), kinds[0])
    lists = {(row, head): Lists(count) for row in range(BATCH) for head in range(HEADS)}
    given_ = {kind: torch.empty(BATCH, HEADS, 0, WIDTHS[kind]) for kind in kinds}
    for step, number in steps:
        if step == "add":
            errors = torch.rand(BATCH, HEADS, number, PAGE)
            for kind in kinds:
                states = torch.randn(BATCH, HEADS, number * PAGE, WIDTHS[kind])
                given_[kind] = torch.cat([given_[kind], states], dim=2)
                exact.add(kind, states, errors)
                states.zero_()  # the tail is overwritten when its oldest tokens leave it
            for (row, head), each in lists.items():
                each.add(errors[row, head].flatten().tolist())
        elif step == "cut":
            pages = max(0, exact.pages - number)
            exact.crop(0, 0, pages, PAGE)
            given_ = {kind: states[:, :, : pages * PAGE] for kind, states in given_.items()}
            for each in lists.values():
                each.truncate(pages)
        else:
            exact.apply(lambda part: part.flip(0))
            given_ = {kind: states.flip(0) for kind, states in given_.items()}
            lists = {(BATCH - 1 - row, head): each for (row, head), each in lists.items()}
        check(exact, lists, given_, count)


def check(exact, lists, given_, count):
    if exact.of(next(iter(given_))) is None:
        return
    assert exact.places.shape[2] >= exact_count(count, exact.pages, PAGE)
    assert (exact.places.diff(dim=2) >= 0).all()
    for (row, head), each in lists.items():
        held = [place for place in exact.places[row, head].tolist() if place >= 0]
        assert held == sorted(each.held)
        for kind, states in given_.items():
            assert torch.equal(exact.of(kind)[row, head, exact.places[row, head] >= 0], states[row, head, held])
        assert exact.of(next(iter(given_))).isfinite().all()


def test_as_many_as_the_pages_account_for_after_a_cut():
    exact = ExactTokens(1, torch.empty(1, 1, 0, 3))
    for pages in (12, 1):
        exact.add("key", torch.randn(1, 1, pages * PAGE, 3), torch.rand(1, 1, pages, PAGE))
        assert exact.places.shape[2] == exact.pages
    exact.crop(0, 0, 0, PAGE)
    assert exact.places.shape[2] == 0
    exact.add("key", torch.randn(1, 1, 3 * PAGE, 3), torch.arange(3.0 * PAGE).view(1, 1, 3, PAGE))
    assert exact.places.tolist() == [[[4, 5, 6, 7, 8, 9, 10, 11]]]
