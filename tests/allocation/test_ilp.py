"""The exact solver, against every plan there is and against dynamic programming; ties, ranges and missing curves."""

import math

import numpy as np
import pytest
from curves import BITS, GROUPS, all_plans, curve, curved, make_score, naive_loss, small, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import falling, make_info

from kvmix_cli.allocation import Budget, allocate, predicted_loss
from kvmix_cli.errors import BudgetError
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.profile import Profile

quick = settings(deadline=None, max_examples=25)
LADDERS = {"k_bits": (2, 3, 4), "v_bits": (2, 4)}
SIZES = {"group_sizes": (64, 32)}


def ilp(profile, asked, **options):
    return allocate(profile, asked, method="ilp", **{**LADDERS, **SIZES, **options})


def alike(layers):
    """A profile whose tensors are all the same."""
    values = curve(1.0)
    score = make_score([values] * layers, [values] * layers)
    return Profile(model=make_info(layers, head_dim=128), scores={"loss": score})


def every(profile):
    return [(plan, naive_loss(profile, plan)) for plan in all_plans(profile, (2, 3, 4), (2, 4), (64, 32))]


@pytest.mark.slow
@quick
@given(small(max_layers=2), st.floats(2.2, 5.2))
def test_no_plan_within_the_stored_bits_loses_less(profile, asked):
    within = [loss for plan, loss in every(profile) if stored(profile, plan) <= asked + 1e-9]
    if not within or asked > 5 + 1e-9:
        with pytest.raises(BudgetError, match=r"in groups of 64,32 reach 2.5 to 5; "):
            ilp(profile, Budget(stored_bits=asked))
        return
    plan = ilp(profile, Budget(stored_bits=asked))
    assert stored(profile, plan.layers) <= asked + 1e-9
    assert plan.provenance["predicted_loss"] == pytest.approx(min(within), abs=1e-9)
    assert naive_loss(profile, plan.layers) == pytest.approx(min(within), abs=1e-9)


@pytest.mark.slow
@quick
@given(small(max_layers=2), st.floats(0, 0.25))
def test_no_smaller_plan_keeps_to_the_loss(profile, asked):
    limit = math.log1p(asked)
    within = [stored(profile, plan) for plan, loss in every(profile) if loss <= limit]
    if not within:
        with pytest.raises(BudgetError, match=r"no plan keeps the predicted perplexity increase within .* reach"):
            ilp(profile, Budget(max_loss=asked))
        return
    plan = ilp(profile, Budget(max_loss=asked))
    assert plan.provenance["predicted_loss"] <= limit + 1e-9
    assert plan.bits.stored <= min(within) + 1e-6


@pytest.mark.slow
@quick
@given(small(max_layers=2), st.integers(200, 3000), st.integers(1, 3), st.floats(0.1, 0.6))
def test_no_plan_within_the_memory_loses_less(profile, context, batch, share):
    def taken(layers):
        return Plan.build(profile.model, layers).cache_bytes(context, batch).total

    asked = Budget(
        memory=share * 2 * 4 * 64 * context * batch * len(profile.model.quantizable), context=context, batch=batch
    )
    within = [loss for plan, loss in every(profile) if taken(plan) <= asked.memory]
    if not within:
        with pytest.raises(BudgetError, match="no plan fits"):
            ilp(profile, asked)
        return
    plan = ilp(profile, asked)
    assert taken(plan.layers) <= asked.memory
    assert naive_loss(profile, plan.layers) == pytest.approx(min(within), abs=1e-9)


def least_by_dynamic_programming(profile, asked):
    """The least loss at each whole cost, tensor by tensor."""
    costs = {(b, g): 16 * b + 16 * 32 // g for b in BITS for g in GROUPS}  # sixteenths of a bit of one tensor
    capacity = math.floor(16 * asked * 2 * len(profile.model.quantizable) + 1e-6)
    best = np.zeros(capacity + 1)
    for layer in profile.score("loss").layers.values():
        for tensor in (layer.k, layer.v):
            options = [np.full(capacity + 1, np.inf)]
            for (bits, group), cost in costs.items():
                option = np.full(capacity + 1, np.inf)
                option[cost:] = best[: capacity + 1 - cost] + tensor.curve[f"{bits}g{group}"]
                options.append(option)
            best = np.min(options, axis=0)
    return best[-1]


@pytest.mark.slow
@pytest.mark.parametrize("asked", [1.5, 2.25, 3, 5.01])
def test_exact_at_80_layers_and_15_choices(asked):
    profile = curved(80)
    plan = ilp(profile, Budget(stored_bits=asked), k_bits=BITS, v_bits=BITS, group_sizes=GROUPS)
    assert plan.bits.stored <= asked + 1e-6
    assert plan.provenance["predicted_loss"] == pytest.approx(least_by_dynamic_programming(profile, asked), rel=1e-7)


def test_nominal_bits_do_not_see_groups():
    plan = ilp(alike(4), Budget(avg_bits=3), group_sizes=(64, 128, 32))
    assert {tensor.group_size for layer in plan.layers.values() for tensor, _ in layer.tensors} == {32}
    assert plan.bits.nominal <= 3


def test_group_sizes_are_told_only_where_they_are_not_the_caches_own():
    plan = ilp(curved(8), Budget(stored_bits=2.6), group_sizes=(128, 64, 32))
    used = {tensor.group_size for layer in plan.layers.values() for tensor, _ in layer.tensors}
    assert plan.cache.group_size == 128
    assert None in used
    assert used <= {None, 64, 32}
    assert plan.provenance["group_sizes"] == [128, 64, 32]


def test_a_group_larger_than_a_head_is_not_offered_twice():
    """Values of 64 channels in groups of 64, 128 or a row are the same thing, and so named."""
    values = curve(1.0, groups=(64, 128))
    profile = Profile(model=make_info(1, head_dim=64), scores={"loss": make_score([values], [values])})
    plan = ilp(profile, Budget(stored_bits=2.5), group_sizes=(64, 128, "row"))
    assert plan.layers[0].v.group_size is None


def test_equal_layers_are_served_in_order():
    plan = ilp(alike(4), Budget(stored_bits=3.25), group_sizes=None, k_bits=(2, 4))
    assert plan.short == "0:k4v4,1:k4v2,2-3:k2v2"
    assert plan == ilp(alike(4), Budget(stored_bits=3.25), group_sizes=None, k_bits=(2, 4))


def test_what_gains_nothing_is_not_paid_for():
    values = {"2g64": 0.0, "3g64": 0.0, "4g64": -0.1}
    profile = Profile(model=make_info(2), scores={"loss": make_score([values] * 2, [values] * 2)})
    plan = allocate(profile, Budget(stored_bits=4.5), method="ilp", k_bits=(2, 3, 4), v_bits=(2, 4))
    assert plan.short == "0-1:k2v2"
    assert plan.provenance["predicted_loss"] == 0


def test_without_curves_it_weighs_importance_against_the_step():
    profile = falling(8)
    plan = allocate(profile, Budget(avg_bits=3), method="ilp")
    k = [layer.k.bits for layer in plan.layers.values()]
    v = [layer.v.bits for layer in plan.layers.values()]
    assert k == sorted(k, reverse=True)
    assert v == sorted(v)
    assert plan.bits.nominal == 3
    assert len({*k, *v}) > 1
    assert "predicted_loss" not in plan.provenance
    assert predicted_loss(plan, profile.score("grad-norm")) is None


def test_a_choice_that_was_not_measured_is_an_error():
    profile = curved(2)
    with pytest.raises(
        BudgetError,
        match=r"score 'loss' was not measured for keys at 2g16, only at 1g32, 1g64, .*leave that choice out, or meas",
    ):
        ilp(profile, Budget(stored_bits=3), cache=CacheSettings(group_size=16), group_sizes=None)


def test_the_papers_share_of_bits_spent_better():
    profile = curved(32)
    paper = allocate(profile, Budget(), k_bits=(2, 3), v_bits=(2, 4))
    plan = ilp(profile, Budget(), group_sizes=None, k_bits=(2, 3), v_bits=(2, 4))
    assert plan.bits.nominal <= paper.bits.nominal
    assert plan.provenance["predicted_loss"] <= paper.provenance["predicted_loss"]


@pytest.mark.parametrize("asked", [0, 99, float("nan"), float("inf")])
def test_impossible_budgets_state_the_range_over_group_sizes(asked):
    with pytest.raises(BudgetError, match=r"K widths 2,3,4 and V widths 2,4 in groups of 128,64,32 reach 2.25 to 5; "):
        ilp(curved(4), Budget(stored_bits=asked), group_sizes=(128, 64, 32))
