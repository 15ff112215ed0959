"""The number of exact tokens beside transform codes, from the losses that a profile has measured."""

import math

import pytest
from made_up import make_info
from with_moments import SCORE, model_moments, profile_with_moments, with_coded

from kvmix_cli.allocation import EXACT, Budget, allocate, make_bases
from kvmix_cli.allocation.correction import loss_ratio
from kvmix_cli.errors import BudgetError
from kvmix_cli.plan import LayerPlan
from kvmix_cli.reporting.tables.plans import stated_loss

PLAIN = profile_with_moments(make_info(3, head_dim=32))
BASIS = make_bases(PLAIN, model_moments(PLAIN.model))
RATIOS = [{1: 4.0, 2: 2.0, 4: 1.0}, {1: 1.1, 2: 1.05, 4: 1.04}, {0: 30.0, 1: 2.0, 2: 1.2, 4: 1.15}, {2: 3.0}]


def plan_of(profile, exact=None, **limit):
    return allocate(profile, Budget(**limit), method="transform", basis=BASIS, exact=exact)


def loss_of(plan):
    return plan.provenance["predicted_loss"]


@pytest.mark.parametrize("ratios", RATIOS)
@pytest.mark.parametrize("limit", [{"stored_bits": 2.6}, {"memory": 400_000, "context": 4096}])
def test_of_all_numbers_that_were_measured_the_plan_has_the_one_that_loses_least(ratios, limit):
    profile = with_coded(PLAIN, ratios)
    best = min((plan_of(profile, exact, **limit) for exact in ratios), key=loss_of)
    assert plan_of(profile, **limit) == best


def test_under_a_limit_of_loss_it_takes_the_fewest_stored_bits():
    profile = with_coded(PLAIN, RATIOS[0])
    plan = plan_of(profile, max_loss=0.05)
    assert loss_of(plan) <= math.log1p(0.05)
    assert plan.bits.stored == min(plan_of(profile, exact, max_loss=0.05).bits.stored for exact in RATIOS[0])


def test_nominal_bits_do_not_pay_for_exact_tokens():
    """A number that halves the loss is worth its bytes, and one that hardly changes it is not."""
    for ratios, expected in ((RATIOS[0], 4), ({1: 1.0, 2: 0.999, 4: 0.998}, 1)):
        profile = with_coded(PLAIN, ratios)
        stored = plan_of(profile, EXACT, avg_bits=2).bits.stored
        plan = plan_of(profile, avg_bits=2)
        assert plan.cache.transform.exact == expected
        assert plan_of(profile, stored_bits=stored).cache.transform.exact == expected
        assert 1.97 < plan.bits.nominal <= 2


def test_the_predicted_loss_is_as_large_as_the_measured_one():
    profile = with_coded(PLAIN, RATIOS[0])
    for exact, ratio in {**RATIOS[0], 3: math.sqrt(2.0), 9: 1.0}.items():
        expected = ratio * loss_of(plan_of(PLAIN, exact, avg_bits=2))
        assert loss_of(plan_of(profile, exact, avg_bits=2)) == pytest.approx(expected)
    assert loss_ratio(profile.score(SCORE), 0, 1024) == pytest.approx(4.0)


def test_losses_are_predicted_for_the_context_that_is_asked_for():
    profile = with_coded(with_coded(PLAIN, {1: 4.0, 4: 2.0}, 1000), {1: 6.0, 4: 8.0}, 4000)
    for context, ratio, of in [(10, 4.0, 1000), (1000, 4.0, 1000), (2000, 24.0**0.5, 2000), (32768, 6.0, 4000)]:
        plan = plan_of(profile, 1, avg_bits=2, context=context)
        assert loss_of(plan) == pytest.approx(ratio * loss_of(plan_of(PLAIN, 1, avg_bits=2)))
        assert plan.provenance["predicted_context"] == of
        assert stated_loss(plan)[0].endswith(f" as fisher-metric predicts in contexts of {of} tokens")
    plain = plan_of(PLAIN, 1, avg_bits=2)
    assert "predicted_context" not in plain.provenance
    assert stated_loss(plain)[0].endswith(" as fisher-metric predicts")


def test_the_number_of_exact_tokens_is_the_best_of_the_context_that_is_asked_for():
    profile = with_coded(with_coded(PLAIN, {1: 4.0, 4: 1.0}, 1000), {1: 4.0, 4: 3.9}, 4000)
    for limit in ({"avg_bits": 2}, {"stored_bits": 2.6}):
        counts = [plan_of(profile, **limit, context=context).cache.transform.exact for context in (1000, 4000)]
        assert counts == [4, 1]


def test_without_measured_losses_it_is_one_and_moments_are_believed():
    plan = plan_of(PLAIN, avg_bits=2)
    assert plan.cache.transform.exact == EXACT == 1
    assert loss_ratio(PLAIN.score(SCORE), 1, 1024) == 1.0


def test_pinned_layers_are_paid_for():
    pins = {0: LayerPlan.of_bits(8, 8)}
    profile = with_coded(PLAIN, RATIOS[0])
    plan = allocate(profile, Budget(avg_bits=4), basis=BASIS, pins=pins)
    assert plan.cache.transform.exact == 4
    assert plan.layers[0] == pins[0]


def test_what_no_number_can_meet_is_one_line():
    profile = with_coded(PLAIN, {2: 1.0, 4: 1.0})
    for limit in ({"avg_bits": 7}, {"stored_bits": 0.1}, {"memory": 100}, {"max_loss": 1e-9}):
        with pytest.raises(BudgetError, match="no plan ") as caught:
            plan_of(profile, **limit)
        assert "\n" not in str(caught.value)
