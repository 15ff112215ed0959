"""Widths, budgets and whole heads by the scores of KV heads: against every plan there is, and by hand."""

from itertools import product

import pytest
from curves import make_score
from made_up import make_info

from kvmix_cli.allocation import Budget, allocate, with_budgets, with_whole_heads
from kvmix_cli.allocation.heads import grouped
from kvmix_cli.errors import BudgetError
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan
from kvmix_cli.plan.tokens import TokenPolicy
from kvmix_cli.plan.windows import Recent
from kvmix_cli.profile import Profile
from kvmix_cli.proportions import shared_out

CURVE = {"2g64": 0.08, "4g64": 0.004}
HEADS = [([0.07, 0.01], [0.002, 0.006]), ([0.03, 0.05], [0.001, 0.001])]
"""Of keys and of values of two heads, in two layers."""


def scored(heads=HEADS):
    score = make_score([CURVE] * 2, [{key: value / 10 for key, value in CURVE.items()}] * 2)
    layers = dict(score.layers)
    for index, pair in enumerate(heads or ()):
        k, v = (
            getattr(layers[index], kind).model_copy(update={"heads": of}) for kind, of in zip("kv", pair, strict=True)
        )
        layers[index] = layers[index].model_copy(update={"k": k, "v": v})
    return Profile(model=make_info(2), scores={"fisher": score.model_copy(update={"layers": layers})})


def loss(profile, widths):
    """The loss of widths by (layer, kind, head), written plainly."""
    total = 0.0
    for (layer, kind, head), bits in widths.items():
        tensor = getattr(profile.scores["fisher"].layers[layer], kind)
        total += tensor.curve[f"{bits}g64"] * tensor.heads[head] / sum(tensor.heads)
    return total


def widths_of(plan):
    found = {}
    for index, layer in plan.layers.items():
        for heads, part in layer.parts(2):
            for head in heads:
                found[index, "k", head], found[index, "v", head] = part.k.bits, part.v.bits
    return found


@pytest.mark.parametrize("bits", [2.25, 2.5, 3.0, 3.75])
def test_no_widths_of_heads_within_the_budget_lose_less(bits):
    profile = scored()
    plan = allocate(profile, Budget(avg_bits=bits), method="ilp", k_bits=(2, 4), v_bits=(2, 4), by_head=True)
    slots = list(product(range(2), "kv", range(2)))
    every = [dict(zip(slots, each, strict=True)) for each in product((2, 4), repeat=8) if sum(each) / 8 <= bits]
    assert plan.bits.nominal <= bits
    assert loss(profile, widths_of(plan)) == pytest.approx(min(loss(profile, each) for each in every))
    assert plan.provenance["by_head"] == "widths"
    assert "predicted_loss" not in plan.provenance or not any(layer.head_groups for layer in plan.layers.values())


def test_heads_that_are_alike_make_no_groups():
    profile = scored([([0.04, 0.04], [0.004, 0.004])] * 2)
    plan = allocate(profile, Budget(avg_bits=4), method="ilp", k_bits=(2, 4), v_bits=(2, 4), by_head=True)
    assert plan.short == "0-1:k4v4"
    assert not any(layer.head_groups for layer in plan.layers.values())


def test_a_layer_has_what_most_of_its_heads_have():
    two, four = LayerPlan.of_bits(2, 2), LayerPlan.of_bits(4, 2)
    layer = grouped({0: four, 1: two, 2: two, 3: four, 4: two})
    assert layer.short == "k2v2"
    assert [(group.heads, group.k.bits, group.v) for group in layer.head_groups] == [((0, 3), 4, None)]


def test_methods_that_know_no_heads_say_so():
    with pytest.raises(BudgetError, match="method rank does not decide by KV head; use --method ilp, or leave out"):
        allocate(scored(), Budget(avg_bits=3), method="rank", by_head=True)


def test_a_score_without_heads_names_the_command_that_measures_them():
    with pytest.raises(
        BudgetError, match=r"not measured by KV head: run `kvmix profile org/model --score fisher --gran"
    ):
        allocate(scored(None), Budget(avg_bits=3), method="ilp", by_head=True)


def keeping(tokens):
    cache = CacheSettings(page=16, sink=4, group_size=16, window=Recent(tokens=12), tokens=TokenPolicy(**tokens))
    return Plan.uniform(make_info(2), 2, 2, cache)


def test_budgets_are_shared_out_over_all_heads():
    """640 tokens in 4 heads: 2 pages each are sure, and 32 are in proportion to 72, 16, 31 and 51."""
    plan = with_budgets(keeping({"keep": 16 + 160, "flush": 32}), scored(), "fisher", 0.2)
    tokens = {
        (index, head): part.settings(plan.cache).kept
        for index, layer in plan.layers.items()
        for heads, part in layer.parts(2)
        for head in heads
    }
    assert sum(tokens.values()) == 640
    assert {slot: kept // 16 - 2 for slot, kept in tokens.items()} == {(0, 0): 13, (0, 1): 3, (1, 0): 6, (1, 1): 10}
    assert plan.cache_bytes(4000).packed == keeping({"keep": 176, "flush": 32}).cache_bytes(4000).packed
    assert Plan.model_validate(plan.model_dump()) == plan


def test_the_best_heads_keep_everything():
    plan = with_whole_heads(keeping({"score": "recency", "keep": 16, "flush": 16}), scored(), "fisher", 0.5)
    whole = {
        (index, head)
        for index, layer in plan.layers.items()
        for heads, part in layer.parts(2)
        for head in heads
        if part.settings(plan.cache).tokens is None
    }
    assert whole == {(0, 0), (1, 1)}
    assert plan.provenance["by_head"] == "whole:0.5"


def test_what_cannot_be_given_to_heads():
    plan = Plan.uniform(make_info(2), 2, 2)
    with pytest.raises(BudgetError, match="budgets of KV heads need a number of tokens to keep: add --with h2o-512"):
        with_budgets(plan, scored(), "fisher")
    with pytest.raises(BudgetError, match="need others that do not: add --with streaming-512"):
        with_whole_heads(plan, scored(), "fisher", 0.5)
    with pytest.raises(BudgetError, match="not measured by KV head"):
        with_whole_heads(keeping({"keep": 176, "flush": 32}), scored(None), "fisher", 0.5)


@pytest.mark.parametrize(
    ("total", "weights", "most", "expected"),
    [
        (10, [1, 1, 1], [99] * 3, [4, 3, 3]),
        (7, [0, 0], [99] * 2, [4, 3]),
        (0, [3, 1], [99] * 2, [0, 0]),
        (10, [8, 1, 1], [4] * 3, [4, 3, 3]),
        (10, [8, 1, 1], [2] * 3, [2, 2, 2]),
        (10, [1, 0, 0], [4, 9, 9], [4, 3, 3]),
    ],
)
def test_whole_numbers_are_shared_out(total, weights, most, expected):
    assert shared_out(total, weights, most) == expected


def test_no_head_keeps_more_than_the_context():
    plan = with_budgets(keeping({"keep": 16 + 160, "flush": 32}), scored(), "fisher", 0.0, context=256)
    kept = [part.settings(plan.cache).kept for layer in plan.layers.values() for _, part in layer.parts(2)]
    assert max(kept) == 240
    assert sum(kept) == 640
