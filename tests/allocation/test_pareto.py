"""A family along the whole range: each what `ilp` gives for its budget, none worse than a smaller one."""

import pytest
from curves import BITS, GROUPS, curve, curved, make_score
from made_up import falling, make_info

from kvmix_cli.allocation import Budget, allocate, frontier, parse_pins
from kvmix_cli.plan import Plan
from kvmix_cli.profile import Profile


def steps(plans):
    return [plan.provenance["budget"]["stored_bits"] for plan in plans]


def losses(plans):
    return [plan.provenance["predicted_loss"] for plan in plans]


@pytest.mark.slow
def test_ascending_bits_falling_losses_and_each_the_optimum():
    profile = curved(4)
    plans = frontier(profile, group_sizes=GROUPS)
    assert len(plans) > 12
    assert all(step % 0.125 == 0 for step in steps(plans))
    assert steps(plans) == sorted(set(steps(plans)))
    assert all(a > b for a, b in zip(losses(plans), losses(plans)[1:], strict=False))
    stored = [plan.bits.stored for plan in plans]
    assert stored == sorted(stored)
    for plan in plans[::5]:
        budget = Budget(stored_bits=plan.provenance["budget"]["stored_bits"])
        best = allocate(profile, budget, method="ilp", group_sizes=GROUPS)
        assert best.layers == plan.layers
        assert best.provenance == {**plan.provenance, "method": "ilp"}


@pytest.mark.slow
def test_it_spans_what_can_be_reached():
    plans = frontier(curved(4, groups=(64,)))
    assert plans[0].short == "0-3:k2v2"
    assert plans[-1].short == "0-3:k8v8"


def test_it_ends_where_more_bits_gain_nothing():
    values = {"2g64": 0.5, "3g64": 0.0, "4g64": 0.0, "8g64": -0.1}
    profile = Profile(model=make_info(2), scores={"loss": make_score([values] * 2, [values] * 2)})
    plans = frontier(profile, v_bits=(2, 3, 8), k_bits=(2, 3, 8))
    assert plans[-1].short == "0-1:k3v3"
    assert losses(plans)[-1] == 0


@pytest.mark.slow
def test_there_are_a_few_dozen_at_most():
    values = curve(1.0, bits=BITS, groups=(64,))
    profile = Profile(model=make_info(40), scores={"loss": make_score([values] * 40, [values] * 40)})
    plans = frontier(profile, k_bits=(*BITS, 16), v_bits=(*BITS, 16))
    assert 24 < len(plans) <= 48
    assert {step % 0.5 for step in steps(plans)} == {0}


@pytest.mark.slow
def test_pins_and_scores_without_curves():
    pins = parse_pins(["0:k8v8"], make_info(8))
    plans = frontier(falling(8), pins=pins)
    assert len(plans) > 8
    assert all(plan.layers[0] == pins[0] for plan in plans)
    assert all("predicted_loss" not in plan.provenance for plan in plans)
    assert all(isinstance(plan, Plan) for plan in plans)


@pytest.mark.parametrize("pins", ["0-3:k2v2", "0-3:k8v8"])
def test_all_layers_pinned_is_a_family_of_one(pins):
    plans = frontier(curved(4), pins=parse_pins([pins], make_info(4)))
    assert [plan.short for plan in plans] == [pins]
