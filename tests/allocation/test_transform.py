"""Transform coding's allocation: the plan of least expected loss, whatever limits it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvmix_kernels.transform_layout import LEFT, MAX_WIDTH
from made_up import make_info, patient
from threadpoolctl import threadpool_info, threadpool_limits
from with_moments import model_moments, profile_with_moments

from kvmix_cli.allocation import Budget, allocate, bases, make_bases
from kvmix_cli.allocation.directions import Filling, expected_loss
from kvmix_cli.errors import BudgetError, PlanError
from kvmix_cli.plan import CacheSettings, LayerPlan, TensorPlan

INFO = make_info(3, head_dim=32)
PROFILE = profile_with_moments(INFO)
BASIS = make_bases(PROFILE, model_moments(INFO))


def plan_of(**limit):
    return allocate(PROFILE, Budget(**limit), basis=BASIS)


def loss_of(plan):
    variances = BASIS.variances(sorted(plan.layers))
    return sum(expected_loss(variances[i, name], getattr(plan.layers[i], name).runs) for i, name in variances)


@patient
@given(
    st.lists(st.floats(1e-6, 10), min_size=1, max_size=3),
    st.integers(0, 18),
    st.sampled_from([None, (4,), (1, 2, 4), (3, 6)]),
)
def test_no_other_widths_lose_less(variances, steps, allowed):
    """Against all widths of up to three runs that cost as much: the loss of the one that fits best."""
    falling = {f"head {i}": np.full((1, 8), variance) for i, variance in enumerate(variances)}
    filling = Filling.of(falling, allowed)
    bits = int(filling.directions[:steps].sum()) // 8  # where widths may jump, what lies between buys nothing
    found = filling.widths(filling.within(8 * bits))
    best = min(
        sum(4 * variance * LEFT[width] for variance, width in zip(variances, widths, strict=True))
        for widths in itertools.product((0, *(allowed or range(1, MAX_WIDTH + 1))), repeat=len(variances))
        if sum(widths) <= bits
    )
    loss = sum(expected_loss(falling[name], widths.tolist()) for name, widths in found.items())
    assert loss == pytest.approx(best, rel=1e-9)
    assert filling.loss(filling.within(8 * bits)) == pytest.approx(best, rel=1e-9)


@patient
@given(st.integers(1, 40), st.integers(0, 200), st.integers(0, 3))
def test_widths_fall_along_a_head_and_a_short_last_run_counts_for_less(dim, bits, seed):
    lengths = -np.sort(-np.random.default_rng(seed).lognormal(0, 2, (2, dim)), axis=1)
    filling = Filling.of({"k": lengths})
    widths = filling.widths(filling.within(bits))["k"]
    assert (np.diff(widths, axis=1) <= 0).all()
    sizes = np.diff([*range(0, dim, 8), dim])
    assert (widths * sizes).sum() <= bits
    assert filling.within(math.inf) == len(filling.worth) and filling.most == 2 * dim * MAX_WIDTH


@patient
@given(st.integers(1, 40), st.integers(0, 9), st.floats(0, 1), st.sampled_from([1, 7, 64]))
def test_a_budget_buys_the_most_bits_that_it_pays_for(dim, seed, share, rounding):
    """Against all counts, also where costs are rounded up or far from proportional."""
    filling = Filling.of({"k": -np.sort(-np.random.default_rng(seed).lognormal(0, 2, (2, dim)), axis=1)})
    bits = [0, *np.cumsum(filling.directions).tolist()]
    for power in (1, 2):
        costs = [100 + -(-(spent**power) // rounding) * rounding for spent in bits]
        allowance = costs[0] + share * (costs[-1] - costs[0])
        asked = []
        found = filling.affording(
            lambda count, costs=costs, asked=asked: asked.append(count) or costs[count], allowance
        )
        assert found == max(count for count, cost in enumerate(costs) if cost <= allowance)
        assert len(asked) <= 4 or power > 1 or rounding > 1


@pytest.mark.parametrize(
    ("limit", "spent"),
    [
        ({"avg_bits": 2.3}, lambda plan: plan.bits.nominal),
        ({"stored_bits": 2.6}, lambda plan: plan.bits.stored),
        ({"memory": 400_000, "context": 4096}, lambda plan: plan.cache_bytes(4096).total),
    ],
)
def test_a_plan_spends_its_budget_and_no_more(limit, spent):
    plan = plan_of(**limit)
    asked = next(iter(limit.values()))
    assert 0.97 * asked <= spent(plan) <= asked * (1 + 1e-6)  # within one run of a head
    assert plan.provenance["predicted_loss"] == pytest.approx(loss_of(plan))


def test_a_loss_is_kept_to_with_as_few_bits_as_possible():
    plan = plan_of(max_loss=0.02)
    assert loss_of(plan) <= math.log1p(0.02)
    fewer = plan_of(avg_bits=plan.bits.nominal - 0.1)
    assert loss_of(fewer) > math.log1p(0.02)


def test_it_is_the_method_of_a_profile_with_directions_and_names_the_basis():
    plan = plan_of(avg_bits=2)
    assert plan.provenance["method"] == "transform"
    assert plan.cache.transform.sha256 == BASIS.sha256
    assert plan.cache.transform.basis.startswith("basis-")
    assert allocate(PROFILE, Budget(avg_bits=2), basis=BASIS, exact=3).cache.transform.exact == 3


def test_pinned_layers_keep_their_widths_and_their_cost():
    pins = {0: LayerPlan.of_bits(8, 8)}
    plan = allocate(PROFILE, Budget(avg_bits=4), basis=BASIS, pins=pins)
    assert plan.layers[0] == pins[0]
    assert 3.9 < plan.bits.nominal <= 4
    assert "predicted_loss" not in plan.provenance


@pytest.mark.parametrize(
    ("limit", "options", "words"),
    [
        ({"avg_bits": 7}, {}, "transform codes reach 0 to 6"),
        ({"stored_bits": 0.1}, {}, "no plan has 0.1 stored bits"),
        ({"memory": 100}, {}, "no plan fits 100 B"),
        ({"max_loss": 1e-9}, {}, "no plan keeps the predicted perplexity"),
        ({}, {}, "has no levels for a share"),
        ({"avg_bits": 2}, {"basis": None}, "kvmix profile org/model --score fisher-metric"),
        ({"avg_bits": 2}, {"exact": 128}, "must be less than the page"),
        ({"max_loss": 0.1}, {"pins": {0: LayerPlan.of_bits(4, 4)}}, "cannot predict the loss of pinned layers"),
    ],
)
def test_what_cannot_be_met_is_one_line(limit, options, words):
    with pytest.raises(BudgetError, match=words) as caught:
        allocate(PROFILE, Budget(**limit), method="transform", **{"basis": BASIS, **options})
    assert "\n" not in str(caught.value)


def test_frames_of_another_size_than_whole_pages_are_refused():
    assert BASIS.frame is None
    plan = allocate(PROFILE, Budget(avg_bits=2), basis=BASIS, cache=CacheSettings(page=96))
    assert plan.cache.page == 96


def test_moments_that_are_not_finite_name_the_layer():
    found = model_moments(INFO)
    found[1].k.metric[0, 0, 0] = np.nan
    with pytest.raises(BudgetError, match="layer 1 has no basis"):
        make_bases(PROFILE, found)


def test_layers_are_shared_out_among_threads_and_their_products_are_not(monkeypatch):
    def linear_algebra_threads():
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    seen, basis_along = set(), bases.basis_along
    monkeypatch.setattr(
        bases, "basis_along", lambda *a, **k: seen.update(linear_algebra_threads()) or basis_along(*a, **k)
    )
    with threadpool_limits(2, user_api="blas"):
        make_bases(PROFILE, model_moments(INFO))
        assert seen == {1} and linear_algebra_threads() == {2}


def test_a_head_that_nobody_reads_gets_no_bits():
    found = model_moments(INFO)
    found[2].v.metric[1] = 0
    plan = allocate(PROFILE, Budget(avg_bits=2), basis=make_bases(PROFILE, found))
    assert plan.layers[2].v.widths[1] == "0000"


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-10, 1.0])
def test_deviations_are_those_of_the_tokens_however_little_a_head_is_read(scale):
    """A budget with bits to spare codes such heads, too: steps for other deviations would make them noise."""
    found = model_moments(INFO)
    found[2].v.metric[1] *= scale
    basis = make_bases(PROFILE, found).layers[2]["v"]
    encode = basis.encode[1].astype(np.float64)
    assert np.sqrt(np.diag(encode @ found[2].v.covariance[1] @ encode.T)) == pytest.approx(basis.deviation[1], rel=1e-3)
    np.testing.assert_allclose(basis.decode[1] @ encode, np.eye(len(encode)), atol=1e-3)


def test_heads_that_are_no_multiple_of_16_are_coded_but_not_packed():
    """Codes come in runs of 8 directions, the last of them shorter."""
    info = make_info(2, head_dim=20)
    profile = profile_with_moments(info)
    basis = make_bases(profile, model_moments(info))
    plan = allocate(profile, Budget(stored_bits=2.5), basis=basis)
    assert plan.bits.stored <= 2.5
    assert all(len(digits) == 3 for layer in plan.layers.values() for digits in (*layer.k.widths, *layer.v.widths))
    pinned = allocate(profile, Budget(stored_bits=9), basis=basis, pins={0: layer_of(16)})
    assert pinned.layers[0].short == "k16v16"
    with pytest.raises(PlanError, match=r"no plan for org/model: .*multiple of 16"):
        allocate(profile, Budget(stored_bits=2.5), basis=basis, pins={0: layer_of(4)})
    with pytest.raises(
        PlanError, match=r"no plan for org/model: .*multiple of 16, got 20: transform codes take heads of any size"
    ):
        allocate(profile, Budget(stored_bits=4), method="rank")


def layer_of(bits):
    return LayerPlan(k=TensorPlan(bits=bits), v=TensorPlan(bits=bits))
