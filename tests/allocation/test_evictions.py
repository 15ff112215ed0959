"""Bits of keys, bits of values and shares to evict at once: against every plan there is."""

from itertools import product

import pytest
from curves import make_score
from made_up import make_info

from kvmix_cli.allocation import Budget, allocate
from kvmix_cli.errors import BudgetError
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TensorPlan
from kvmix_cli.plan.tokens import Tier, TokenPolicy, TokenShares
from kvmix_cli.profile import Profile

K = [{"2g64": 0.05, "4g64": 0.004}, {"2g64": 0.01, "4g64": 0.001}]
V = [{"2g64": 0.006, "4g64": 0.001}, {"2g64": 0.002, "4g64": 0.0005}]
EVICTED = [{0.25: 0.001, 0.5: 0.02}, {0.25: 0.02, 0.5: 0.03}]
MENU = (0.0, 0.25, 0.5)
ASKED = {"method": "ilp", "k_bits": (2, 4), "v_bits": (2, 4), "evict": MENU}


def scored(evicted=EVICTED):
    score = make_score(K, V)
    layers = {index: layer.model_copy(update={"evict": evicted[index]}) for index, layer in score.layers.items()}
    return Profile(model=make_info(2), scores={"kl": score.model_copy(update={"layers": layers})})


def every():
    """Every plan there is, with its loss."""
    cache = CacheSettings(tokens=TokenPolicy(evict=0.5, flush=512))
    one = list(product((2, 4), (2, 4), MENU))
    for choices in product(one, repeat=2):
        layers, loss = {}, 0.0
        for index, (k, v, share) in enumerate(choices):
            own = TokenShares(evict=share)
            layers[index] = LayerPlan(k=TensorPlan(bits=k), v=TensorPlan(bits=v), tokens=own)
            loss += K[index][f"{k}g64"] + V[index][f"{v}g64"] + EVICTED[index].get(share, 0.0)
        yield Plan.build(make_info(2), layers, cache), loss


def loss_of(plan):
    total = 0.0
    for index, layer in plan.layers.items():
        policy = layer.settings(plan.cache).tokens
        total += K[index][f"{layer.k.bits}g64"] + V[index][f"{layer.v.bits}g64"]
        total += EVICTED[index].get(policy.evict, 0.0) if policy else 0.0
    return total


@pytest.mark.parametrize("stored", [1.5, 2.0, 2.6, 3.0, 3.75, 4.5])
def test_no_plan_within_the_bits_loses_less(stored):
    plan = allocate(scored(), Budget(stored_bits=stored), **ASKED)
    assert plan.bits.stored <= stored + 1e-3
    assert loss_of(plan) == pytest.approx(min(loss for each, loss in every() if each.bits.stored <= stored + 1e-9))
    assert plan.provenance["evict"] == [0.0, 0.25, 0.5]


def test_bytes_are_those_of_the_plan():
    memory = 1_200_000
    plan = allocate(scored(), Budget(memory=memory, context=4096), **ASKED)
    assert plan.cache_bytes(4096).total <= memory
    assert loss_of(plan) == pytest.approx(min(loss for each, loss in every() if each.cache_bytes(4096).total <= memory))


def test_the_smallest_plan_within_a_loss():
    plan = allocate(scored(), Budget(max_loss=0.03), **ASKED)
    within = [each.bits.stored for each, loss in every() if loss <= 0.0295]
    assert loss_of(plan) <= 0.0296
    assert plan.bits.stored == pytest.approx(min(within), abs=1e-3)


def test_pinned_layers_keep_everything():
    pins = {0: LayerPlan.of_bits(4, 4)}
    plan = allocate(scored(), Budget(stored_bits=3), pins=pins, **ASKED)
    assert plan.layers[0].settings(plan.cache).tokens is None
    assert plan.bits.stored <= 3


def test_noise_that_makes_a_larger_share_lose_less_is_levelled():
    noisy = scored([{0.25: 0.03, 0.5: 0.01}, EVICTED[1]])
    plan = allocate(noisy, Budget(stored_bits=2.0), **ASKED)
    assert plan.layers[0].settings(plan.cache).tokens.evict == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"evict": (0.0, 0.125)},
            r"kl' has not measured what evicting 0.125 of the tokens costs: run `kvmix profile org",
        ),
        ({"evict": (0.0,)}, "need at least one that is more than 0"),
        ({"evict": (0.0, 1.0)}, "shares to evict are from 0 on and below 1, got 0, 1"),
        ({"method": "rank"}, "shares to evict need --method ilp, and go without --by-head"),
        (
            {"cache": CacheSettings(tokens=TokenPolicy(tiers=(Tier(share=0.5, k=8, v=8),), flush=256))},
            "do not go with tiers",
        ),
        (
            {"cache": CacheSettings(tokens=TokenPolicy(evict=0.5, flush=256))},
            "0.25 cannot be evicted: shares of a flush",
        ),
    ],
)
def test_menus_that_cannot_be_used(options, message):
    with pytest.raises(BudgetError, match=message):
        allocate(scored(), Budget(stored_bits=3), **{**ASKED, **options})


def test_budgets_that_no_plan_meets():
    with pytest.raises(BudgetError, match="no plan meets the budget, even with 50 % of the tokens evicted"):
        allocate(scored(), Budget(stored_bits=1), **ASKED)
