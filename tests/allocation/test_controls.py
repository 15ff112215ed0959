"""The methods that know nothing of scores, for comparison: random at equal bytes, uniform below them."""

from itertools import product

import pytest
from curves import curved
from hypothesis import given
from hypothesis import strategies as st
from made_up import falling, ladders, make_info, patient, scored, settings_

from kvmix_cli.allocation import METHODS, Budget, allocate, default_method, default_score, preset_start
from kvmix_cli.errors import BudgetError
from kvmix_cli.profile import Profile


def counts(plan):
    """How many layers are at each width, for keys and for values."""
    widths = [(each.k.bits, each.v.bits) for each in plan.layers.values()]
    return sorted(k for k, _ in widths), sorted(v for _, v in widths)


@pytest.mark.slow
@patient
@given(scored(40), ladders, ladders, st.floats(1, 16), settings_, st.integers(0, 2**32))
def test_random_takes_exactly_the_bytes_of_rank(profile, k_bits, v_bits, asked, cache, seed):
    options = {"k_bits": k_bits, "v_bits": v_bits, "cache": cache}
    try:
        rank = allocate(profile, Budget(avg_bits=asked), **options)
    except BudgetError:
        with pytest.raises(BudgetError):
            allocate(profile, Budget(avg_bits=asked), method="random", seed=seed, **options)
        return
    random = allocate(profile, Budget(avg_bits=asked), method="random", seed=seed, **options)
    assert counts(random) == counts(rank)
    assert random.bits == rank.bits
    assert random.cache_bytes(8192) == rank.cache_bytes(8192)


def test_random_depends_on_the_seed_and_on_nothing_else():
    def drawn(seed, profile=falling(32)):  # noqa: B008
        return allocate(profile, Budget(avg_bits=2.5), method="random", seed=seed)

    assert drawn(1) == drawn(1)
    assert len({drawn(seed).short for seed in range(8)}) == 8
    assert drawn(3).provenance["seed"] == 3
    assert "score" not in drawn(3).provenance


def test_random_draws_keys_and_values_apart():
    def higher(plan, kind):
        return frozenset(layer for layer, each in plan.layers.items() if getattr(each, kind).bits > 2)

    plans = [allocate(falling(64), Budget(avg_bits=2.5), method="random", seed=seed) for seed in range(8)]
    assert all(higher(plan, "k") != higher(plan, "v") for plan in plans)
    assert all(len({higher(plan, kind) for plan in plans}) == len(plans) for kind in "kv")


@pytest.mark.slow
@patient
@given(scored(50), ladders, ladders, st.floats(1, 16))
def test_uniform_is_the_highest_pair_that_fits(profile, k_bits, v_bits, asked):
    sums = [k + v for k, v in product(k_bits, v_bits) if (k + v) / 2 <= asked + 1e-9]
    try:
        plan = allocate(profile, Budget(avg_bits=asked), method="uniform", k_bits=k_bits, v_bits=v_bits)
    except BudgetError:
        assert not sums or asked > (max(k_bits) + max(v_bits)) / 2
        return
    (pair,) = {(each.k.bits, each.v.bits) for each in plan.layers.values()}
    assert sum(pair) == max(sums)


@pytest.mark.parametrize(
    ("asked", "pair"), [(2, (2, 2)), (2.3, (2, 2)), (3, (4, 2)), (4, (4, 4)), (5.9, (8, 2)), (8, (8, 8))]
)
def test_uniform_prefers_balance_and_then_keys(asked, pair):
    plan = allocate(falling(4), Budget(avg_bits=asked), method="uniform", k_bits=(2, 4, 8))
    assert {(each.k.bits, each.v.bits) for each in plan.layers.values()} == {pair}


def test_uniform_by_memory_fits():
    asked = Budget(memory=25 * 2**20, context=32768)
    plan = allocate(falling(8), asked, method="uniform")
    assert plan.cache_bytes(32768).total <= asked.memory
    assert plan.bits.nominal == 2.5


def test_under_the_papers_rule_uniform_is_two_bits():
    preset = preset_start("paper")
    options = {"k_bits": preset.k_bits, "v_bits": preset.v_bits, "cache": preset.cache}
    assert allocate(falling(32), preset.budget, method="uniform", **options).short == "0-31:k2v2"


@pytest.mark.parametrize("method", ["rank", "uniform", "random"])
@pytest.mark.parametrize("asked", [0, float("nan"), 99])
def test_every_method_refuses_an_impossible_budget(method, asked):
    with pytest.raises(BudgetError, match="reach 2 to 8"):
        allocate(falling(8), Budget(avg_bits=asked), method=method)


def test_registry_knows_its_methods_and_suggests_near_names():
    assert list(METHODS) == ["rank", "ilp", "cut", "uniform", "random", "transform", "pareto", "search"]
    assert [name for name in METHODS if METHODS[name].solve is None] == ["pareto", "search"]
    with pytest.raises(BudgetError, match=r"unknown method 'rnak' \(did you mean 'rank'\?\)"):
        METHODS["rnak"]
    with pytest.raises(BudgetError, match="known are rank, ilp, cut, uniform, random, transform, pareto, search"):
        METHODS["zzz"]


@pytest.mark.parametrize(("method", "why"), [("pareto", "takes no budget"), ("search", "has to measure plans")])
def test_methods_that_do_not_decide_one_plan_from_a_budget(method, why):
    with pytest.raises(BudgetError, match=f"'{method}' {why}; one plan from a budget: rank, ilp, cut, uniform, random"):
        allocate(falling(4), Budget(avg_bits=3), method=method)


@pytest.mark.parametrize(
    ("scores", "ranked", "weighed"),
    [
        (["error", "grad-norm", "loss", "taylor"], "grad-norm", "loss"),
        (["kl", "fisher"], "fisher", "fisher"),
        (["loss", "kl"], "kl", "kl"),
        (["grad-norm", "taylor", "error", "fisher"], "grad-norm", "fisher"),
        (["error", "taylor"], "taylor", "taylor"),
        (["mine", "grad-norm"], "grad-norm", "grad-norm"),
        (["mine", "yours"], "mine", "mine"),
    ],
)
def test_the_score_a_method_takes_if_none_is_named(scores, ranked, weighed):
    each = falling(4).score("grad-norm")
    profile = Profile(model=make_info(4), scores=dict.fromkeys(scores, each))
    assert default_score(profile, "rank") == ranked
    assert {default_score(profile, method) for method in METHODS if method not in ("rank", "transform")} == {weighed}
    assert allocate(profile, Budget(avg_bits=3)).provenance["score"] == ranked


def test_the_method_if_none_is_named_depends_on_whether_widths_are_known():
    assert default_method(falling(4)) == "rank"
    profile = curved(4)
    assert default_method(profile) == "ilp"
    assert allocate(profile, Budget(avg_bits=3)) == allocate(profile, Budget(avg_bits=3), method="ilp")
