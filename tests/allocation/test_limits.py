"""What holds for every method: pins, bounds of the ladders, predicted loss as a budget, and costs to the byte."""

import math
import re

import pytest
import torch
from architectures import build
from curves import GROUPS, all_plans, curved, naive_loss, small
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import falling, make_info

from kvmix_cli.allocation import SOLVERS, Budget, allocate, parse_pins
from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.errors import BudgetError, PlanError
from kvmix_cli.plan import CacheSettings, LayerPlan, ModelInfo, TensorPlan
from kvmix_cli.plan.sizes import mean_bits
from kvmix_cli.plan.windows import NoWindow, Recent, Rpc
from kvmix_cli.profile import Profile

quick = settings(deadline=None, max_examples=20)
every_solver = pytest.mark.parametrize("method", SOLVERS)
PINS = {
    0: LayerPlan(k=TensorPlan(bits=8), v=TensorPlan(bits=8)),
    3: LayerPlan(k=TensorPlan(bits=4), v=TensorPlan(bits=8)),
}


def bits(plan):
    return {tensor.bits for layer in plan.layers.values() for tensor, _ in layer.tensors}


def pairs(plan):
    return {index: (layer.k.bits, layer.v.bits) for index, layer in plan.layers.items()}


@every_solver
@pytest.mark.parametrize(
    "asked", [Budget(avg_bits=3.4), Budget(stored_bits=3.9), Budget(memory=20 * 2**20, context=8192)]
)
def test_pins_are_kept_and_paid_for_by_the_others(method, asked):
    profile = curved(8)
    plan = allocate(profile, asked, method=method, pins=PINS)
    free = allocate(profile, asked, method=method)
    assert pairs(plan)[0] == (8, 8)
    assert pairs(plan)[3] == (4, 8)
    assert plan.provenance["pins"] == {0: "k8v8", 3: "k4v8"}
    for each in (plan, free):
        taken = {
            "avg_bits": each.bits.nominal,
            "stored_bits": each.bits.stored,
            "memory": each.cache_bytes(8192).total,
        }
        assert taken[next(iter(asked.summary))] <= asked.limit
    assert sum(map(sum, pairs(plan).values())) <= sum(map(sum, pairs(free).values())) + 16


@quick
@given(small(max_layers=3), st.floats(2.5, 4.5), st.sampled_from([(2, 2), (4, 3), (2, 8)]))
def test_the_optimum_around_a_pin_is_the_best_of_all_plans_with_it(profile, asked, widths):
    pins = {0: LayerPlan(k=TensorPlan(bits=min(4, widths[0])), v=TensorPlan(bits=min(4, widths[1])))}
    options = {"method": "ilp", "pins": pins, "k_bits": (2, 4), "v_bits": (2, 3)}
    within = [
        naive_loss(profile, layers)
        for layers in all_plans(profile, (2, 4), (2, 3), (64,), pins=pins)
        if mean_bits(layers, CacheSettings(), profile.model, "stored") <= asked + 1e-9
    ]
    try:
        plan = allocate(profile, Budget(stored_bits=asked), **options)
    except BudgetError:
        highest = max(
            mean_bits(layers, CacheSettings(), profile.model, "stored")
            for layers in all_plans(profile, (2, 4), (2, 3), (64,), pins=pins)
        )
        assert not within or asked > highest
        return
    assert naive_loss(profile, plan.layers) == pytest.approx(min(within), abs=1e-9)


@every_solver
def test_pins_that_leave_too_little_state_the_range(method):
    with pytest.raises(BudgetError, match=r"beside 2 pinned layers reach 5 to 8; "):
        allocate(curved(4), Budget(stored_bits=3), method=method, pins=PINS)


@every_solver
def test_every_layer_can_be_pinned(method):
    pins = parse_pins(["0-3:k2v4"], make_info(4))
    assert allocate(curved(4), Budget(avg_bits=3), method=method, pins=pins).short == "0-3:k2v4"
    with pytest.raises(BudgetError, match="beside 4 pinned layers reach 3 to 3"):
        allocate(curved(4), Budget(avg_bits=2.5), method=method, pins=pins)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["0,-1:k8v8"], {0: (8, 8), 7: (8, 8)}),
        (["0-2:k4v2; -2 : k8v4"], {0: (4, 2), 1: (4, 2), 2: (4, 2), 6: (8, 4)}),
        (["1:k2v2", "3-3,-8:k16v1"], {0: (16, 1), 1: (2, 2), 3: (16, 1)}),
    ],
)
def test_pins_as_text(texts, expected):
    pins = parse_pins(texts, make_info(8))
    assert {layer: (plan.k.bits, plan.v.bits) for layer, plan in pins.items()} == expected
    assert list(pins) == sorted(pins)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no pin: write it like 0,-1:k8v8 or 0-3:k4v2"),
        ("0:k8", "'0:k8' is no pin"),
        ("0:k8v8;", "'' is no pin"),
        ("0,:k8v8", "is no pin"),
        ("x:k8v8", "is no pin"),
        ("0:k5v8", "'0:k5v8' is no pin: bits: must be one of 1, 2, 3, 4, 8, 16, got 5"),
        ("3-1:k8v8", "'3-1' is no pin: it ends before it begins"),
        ("8:k8v8", "layer 8 cannot be planned: the model has layers 0-7"),
        ("-9:k8v8", "'-9' is no pin: org/model has 8 layers, so -8 is the first"),
        ("0-99999:k8v8", "layer 26 cannot be planned: the model has layers 0-7; and 99973 more"),
        ("0-1,1:k8v8", "layer 1 of org/model is pinned twice"),
        ("7:k8v8;-1:k8v8", "layer 7 of org/model is pinned twice"),
        ("2:k8v8", "layer 2 cannot be planned: it keeps its sliding_attention cache"),
    ],
)
def test_wrong_pins(text, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        parse_pins([text], make_info(8, stock={2: "sliding_attention"}))


@every_solver
def test_bounds_cut_both_ladders(method):
    options = {"method": method, "min_bits": 3, "max_bits": 4, "v_bits": (2, 4, 8)}
    assert bits(allocate(curved(8), Budget(avg_bits=3.7), **options)) <= {3, 4}
    with pytest.raises(BudgetError, match=r"K widths 3,4 and V widths 4 reach 3.5 to 4"):
        allocate(curved(8), Budget(avg_bits=3), **options)


@pytest.mark.parametrize("bounds", [{"min_bits": 9}, {"max_bits": 1}, {"min_bits": 5, "max_bits": 7}])
def test_bounds_that_leave_nothing(bounds):
    with pytest.raises(BudgetError, match=r"k_bits 2, 3, 4, 8 have none of [0-9] to [0-9] bits"):
        allocate(falling(4), Budget(avg_bits=3), **bounds)


@pytest.mark.slow
@every_solver
@pytest.mark.parametrize("asked", [0.002, 0.01, 0.05, 0.3])
def test_the_predicted_loss_is_kept_to(method, asked):
    profile = curved(8, scale=0.01)
    plan = allocate(profile, Budget(max_loss=asked), method=method)
    assert naive_loss(profile, plan.layers) <= math.log1p(asked) * (1 + 1e-9)
    assert plan.provenance["budget"] == {"max_loss": asked}
    assert plan.provenance["score"] == "loss"
    best = allocate(profile, Budget(max_loss=asked), method="ilp")
    assert best.bits.stored <= plan.bits.stored


@pytest.mark.parametrize("method", ["rank", "random"])
def test_climbing_stops_as_soon_as_the_loss_is_low_enough(method):
    """One move less, the most that an average below the plan's buys, would lose too much."""
    profile = curved(8, scale=0.01)
    plan = allocate(profile, Budget(max_loss=0.02), method=method)
    less = allocate(profile, Budget(avg_bits=plan.bits.nominal - 0.001), method=method)
    assert naive_loss(profile, less.layers) > math.log1p(0.02)


@every_solver
def test_a_loss_out_of_reach_states_the_least(method):
    profile = curved(8, scale=0.1)
    least = 100 * math.expm1(naive_loss(profile, allocate(profile, Budget(avg_bits=8), method="uniform").layers))
    with pytest.raises(BudgetError, match=f"within 0.001 %: K widths .* reach {least:.3g} %; widen"):
        allocate(profile, Budget(max_loss=0.00001), method=method)


@every_solver
def test_pins_use_up_the_loss(method):
    profile = curved(8, scale=0.1)
    with pytest.raises(BudgetError, match="beside 1 pinned layer reach"):
        allocate(profile, Budget(max_loss=0.01), method=method, pins=parse_pins(["0:k1v1"], profile.model))


@every_solver
def test_a_loss_needs_a_score_that_predicts_one(method):
    both = Profile(
        model=make_info(4, head_dim=128),
        scores={**falling(4).scores, **curved(4).scores, **curved(4, name="fisher").scores},
    )
    with pytest.raises(BudgetError, match=r"'grad-norm' does not predict a loss.*: use --score loss or fisher"):
        allocate(both, Budget(max_loss=0.01), method=method, score="grad-norm")
    with pytest.raises(BudgetError, match="measure one that does with `kvmix profile org/model --score fisher`"):
        allocate(falling(4), Budget(max_loss=0.01), method=method)


@pytest.mark.parametrize("share", [-0.1, float("nan"), float("inf")])
def test_a_loss_that_is_no_share(share):
    with pytest.raises(BudgetError, match="max_loss is a share"):
        Budget(max_loss=share)


@every_solver
def test_methods_without_a_choice_of_groups_use_the_first(method):
    plan = allocate(curved(8), Budget(stored_bits=3.4), method=method, group_sizes=GROUPS)
    assert plan.cache.group_size == GROUPS[0]
    sizes = {tensor.group_size for layer in plan.layers.values() for tensor, _ in layer.tensors}
    assert method == "ilp" or sizes == {None}


@pytest.mark.parametrize("size", [4, "col", 0])
def test_group_sizes_that_cannot_be(size):
    with pytest.raises(BudgetError, match="group_size: must be a number of at least 8 or 'row'"):
        allocate(curved(2), Budget(stored_bits=3), method="ilp", group_sizes=(64, size))


@pytest.mark.parametrize("window", [Recent(tokens=40), Rpc(), NoWindow()])
def test_a_memory_budget_is_met_by_the_tensors_of_a_real_cache(window):
    """Mixed widths and mixed group sizes, counted by the allocator and held by the model."""
    context, batch, info = 700, 3, ModelInfo(id="test", layers=4, kv_heads=2, head_dim=16)
    profile = Profile(model=info, scores=curved(4, groups=(8, 16, 32)).scores)
    asked = Budget(memory=400_000, context=context, batch=batch)
    cache = CacheSettings(page=32, sink=4, window=window)
    plan = allocate(profile, asked, method="ilp", cache=cache, group_sizes=(16, 8, 32))
    assert len({(tensor.bits, tensor.group_size) for layer in plan.layers.values() for tensor, _ in layer.tensors}) > 3
    model = build("llama", torch.bfloat16)
    cache = MixedCache.from_plan(plan, model.config)
    with torch.no_grad():
        model(torch.ones(batch, context, dtype=torch.long), past_key_values=cache)
        model(torch.ones(batch, 1, dtype=torch.long), past_key_values=cache)
    held = cache.nbytes - batch * plan.unquantized_bytes(1)
    assert held == plan.cache_bytes(context, batch).total
    assert held <= asked.memory
