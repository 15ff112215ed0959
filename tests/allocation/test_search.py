"""Refinement on measured loss: better than its start, within the budget, and reproducible."""

import pytest
from curves import curved, surprising
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import falling, make_info

from kvmix_cli.allocation import Budget, allocate, parse_pins, refine
from kvmix_cli.errors import BudgetError
from kvmix_cli.plan import Plan

WIDTHS = {"k_bits": (2, 3, 4), "v_bits": (2, 4)}
ASKED = Budget(stored_bits=3.1)


def watched(measure):
    """The same, and the plans that were measured."""
    seen = []
    return seen, lambda layers: seen.append(dict(layers)) or measure(layers)


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), st.floats(2.6, 4), st.integers(1, 30))
def test_never_worse_than_ilp_and_never_over_the_budget(seed, asked, trials):
    profile, budget = curved(4, seed=seed), Budget(stored_bits=asked)
    seen, measure = watched(surprising(profile, seed))
    plan = refine(profile, budget, measure, trials=trials, **WIDTHS)
    start = allocate(profile, budget, method="ilp", **WIDTHS)
    assert seen[0] == start.layers
    assert len(seen) <= trials
    assert len({frozenset(layers.items()) for layers in seen}) == len(seen) == plan.provenance["trials"]
    assert all(Plan.build(profile.model, layers).bits.stored <= asked + 1e-6 for layers in seen)
    losses = [surprising(profile, seed)(layers) for layers in seen]
    assert plan.provenance["measured_loss"] == min(losses) == surprising(profile, seed)(plan.layers)


def test_it_finds_what_the_curves_do_not_know():
    profile = curved(6)
    plan = refine(profile, ASKED, surprising(profile), trials=300, **WIDTHS)
    start = allocate(profile, ASKED, method="ilp", **WIDTHS)
    assert surprising(profile)(plan.layers) < 0.9 * surprising(profile)(start.layers)
    assert plan.provenance["trials"] < 300, "it ended where no neighbour was better"


def test_provenance_says_how_to_make_it_again():
    profile = curved(4)
    plan = refine(profile, ASKED, surprising(profile), trials=5, seed=3, **WIDTHS)
    assert plan == refine(profile, ASKED, surprising(profile), trials=5, seed=3, **WIDTHS)
    told = ("method", "score", "seed", "budget", "trials")
    assert [plan.provenance[name] for name in told] == ["search", "loss", 3, {"stored_bits": 3.1}, 5]


def test_without_curves_it_starts_from_the_ranking():
    profile = falling(6)
    seen, measure = watched(lambda layers: -float(layers[5].k.bits))
    plan = refine(profile, Budget(avg_bits=2.6), measure, trials=50, v_bits=(2, 4, 8), group_sizes=(64, 32))
    assert seen[0] == allocate(profile, Budget(avg_bits=2.6)).layers
    assert plan.layers[5].k.bits > seen[0][5].k.bits
    assert plan.bits.nominal <= 2.6


def test_pins_stay_and_a_loss_budget_is_refined_at_the_size_it_gives():
    profile, pins = curved(4, scale=0.01), parse_pins(["-1:k8v8"], make_info(4))
    start = allocate(profile, Budget(max_loss=0.01), method="ilp", pins=pins)
    seen, measure = watched(surprising(profile))
    plan = refine(profile, Budget(max_loss=0.01), measure, trials=20, pins=pins)
    assert len(seen) > 5
    assert all(layers[3] == pins[3] for layers in seen)
    assert plan.bits.stored <= start.bits.stored


def test_an_impossible_budget_measures_nothing():
    with pytest.raises(BudgetError, match=r"reach 2\.5 to 8"):
        refine(curved(4), Budget(stored_bits=2), lambda layers: pytest.fail("measured"))
