"""The paper's rule: an exact share for the preset, the best share for a budget, ties by layer index."""

from bisect import bisect_right

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import falling, ladders, make_info, make_profile, patient, scored, settings_

from kvmix_cli.allocation import Budget, allocate, preset_start
from kvmix_cli.errors import BudgetError, DocumentError, PlanError
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TensorPlan
from kvmix_cli.plan.sizes import mean_bits
from kvmix_cli.plan.windows import Recent


def mean(plan, kind=None, count="nominal"):
    return mean_bits(plan.layers, plan.cache, plan.model, count, kind)


def paper(profile, **options):
    start = preset_start("paper")
    return allocate(profile, start.budget, k_bits=start.k_bits, v_bits=start.v_bits, cache=start.cache, **options)


def ranks(profile, kind):
    """Place of every layer, 0 for the most important."""
    scores = profile.scores["grad-norm"].layers
    order = sorted(scores, key=lambda layer: (-getattr(scores[layer], kind).mean, layer))
    return {layer: place for place, layer in enumerate(order)}


def after(profile, k_bits, v_bits):
    """The widths after `u` moves, in closed form: the layer at place r has made `ceil((u - r) / L)` of them."""
    k, v = ranks(profile, "k"), ranks(profile, "v")
    count = len(k)

    def level(moves, place, ladder):
        return ladder[min((moves + count - 1 - place) // count, len(ladder) - 1)]

    def widths(moves):
        return {layer: (level(moves, k[layer], k_bits), level(moves, v[layer], v_bits)) for layer in sorted(k)}

    return widths, count * (max(len(k_bits), len(v_bits)) - 1)


def best_within(profile, k_bits, v_bits, cost, asked):
    """Every number of moves tried: the widths of the last that costs no more than asked, None if none does."""
    widths, most = after(profile, k_bits, v_bits)
    best = bisect_right(range(most + 1), asked, key=lambda moves: cost(widths(moves))) - 1
    out_of_reach = best < 0 or (best == most and cost(widths(most)) < asked - 1e-9)
    return widths(best) if best >= 0 else None, out_of_reach


def widths_of(plan):
    return {layer: (each.k.bits, each.v.bits) for layer, each in plan.layers.items()}


def as_plan(profile, widths, cache):
    layers = {layer: LayerPlan(k=TensorPlan(bits=k), v=TensorPlan(bits=v)) for layer, (k, v) in widths.items()}
    return Plan.build(profile.model, layers, cache)


def nominal(widths):
    return sum(k + v for k, v in widths.values()) / (2 * len(widths))


def test_paper_preset_on_32_layers_is_exactly_the_papers():
    plan = paper(falling(32))
    assert (mean(plan, "key"), mean(plan, "value")) == (2.1875, 2.375)
    assert [layer for layer, each in plan.layers.items() if each.k.bits == 3] == list(range(6))
    assert [layer for layer, each in plan.layers.items() if each.v.bits == 4] == list(range(26, 32))
    assert plan.cache.model_dump() == {
        "page": 32,
        "sink": 0,
        "group_size": 32,
        "scale_dtype": "float16",
        "window": {"kind": "rpc", "ratio": {1: 0.1, 2: 0.1, 3: 0.2, 4: 0.2, 8: 0.2}},
    }


@pytest.mark.parametrize(("layers", "high"), [(1, 1), (2, 1), (5, 1), (8, 2), (9, 2), (28, 6), (32, 6), (80, 16)])
def test_paper_preset_never_leaves_a_model_without_a_high_layer(layers, high):
    plan = paper(falling(layers))
    assert sum(each.k.bits == 3 for each in plan.layers.values()) == high
    assert sum(each.v.bits == 4 for each in plan.layers.values()) == high


def test_average_of_2_3_on_32_layers_is_the_papers_share():
    plan = allocate(falling(32), Budget(avg_bits=2.3), k_bits=(2, 3), v_bits=(2, 4))
    assert plan.bits.nominal == 2.28125
    assert widths_of(plan) == widths_of(paper(falling(32)))


@pytest.mark.parametrize("asked", [2, 2.5, 3.5, 3.51, 6, 8])
def test_default_ladders_are_the_papers_and_then_go_on(asked):
    plan = allocate(falling(10), Budget(avg_bits=asked))
    used = set(widths_of(plan).values())
    expected = {(k, v) for k in (2, 3) for v in (2, 4)} if asked <= 3.5 else {(k, v) for k in (3, 4, 8) for v in (4, 8)}
    assert used <= expected


@patient
@given(scored(60), ladders, ladders, st.floats(0.5, 17))
def test_average_is_the_largest_step_within_the_budget(profile, k_bits, v_bits, asked):
    expected, out_of_reach = best_within(profile, k_bits, v_bits, nominal, asked)
    if out_of_reach:
        with pytest.raises(BudgetError):
            allocate(profile, Budget(avg_bits=asked), k_bits=k_bits, v_bits=v_bits)
        return
    plan = allocate(profile, Budget(avg_bits=asked), k_bits=k_bits, v_bits=v_bits)
    assert widths_of(plan) == expected


@pytest.mark.slow
@patient
@given(scored(60), ladders, ladders, st.data())
def test_a_budget_that_a_step_meets_exactly_gives_that_step(profile, k_bits, v_bits, data):
    widths, most = after(profile, k_bits, v_bits)
    step = widths(data.draw(st.integers(0, most)))
    plan = allocate(profile, Budget(avg_bits=nominal(step)), k_bits=k_bits, v_bits=v_bits)
    assert widths_of(plan) == step


@pytest.mark.slow
@patient
@given(scored(24), ladders, ladders, settings_, st.floats(1, 18))
def test_stored_bits_are_used_up_to_the_next_move(profile, k_bits, v_bits, cache, asked):
    def stored(widths):
        return mean(as_plan(profile, widths, cache), count="stored")

    expected, out_of_reach = best_within(profile, k_bits, v_bits, stored, asked + 1e-9)
    options = {"k_bits": k_bits, "v_bits": v_bits, "cache": cache}
    if out_of_reach:
        with pytest.raises(BudgetError):
            allocate(profile, Budget(stored_bits=asked), **options)
        return
    assert widths_of(allocate(profile, Budget(stored_bits=asked), **options)) == expected


@pytest.mark.slow
@patient
@given(scored(24), st.integers(1, 20000), st.integers(1, 8), st.floats(0.05, 1.2), st.integers(0, 600))
def test_memory_is_counted_in_the_bytes_that_the_cache_will_take(profile, context, batch, share, recent):
    cache = CacheSettings(window=Recent(tokens=recent))

    def taken(widths):
        return as_plan(profile, widths, cache).cache_bytes(context, batch).total

    full = 4 * context * batch * profile.model.kv_heads * profile.model.head_dim * len(profile.model.quantizable)
    asked = Budget(memory=int(share * full), context=context, batch=batch)
    expected, _ = best_within(profile, (2, 3, 4, 8), (2, 4, 8), taken, asked.memory)
    if expected is None:
        with pytest.raises(BudgetError):
            allocate(profile, asked, cache=cache)
        return
    assert widths_of(allocate(profile, asked, cache=cache)) == expected


@pytest.mark.parametrize(("layers", "high"), [(19, 10), (21, 6), (23, 4), (26, 1), (26, 3)])
def test_a_mean_that_rounds_down_still_buys_its_layers(layers, high):
    """Here `mean * layers` is below what the layers take, by the last bit of a float."""
    plan = allocate(falling(layers), Budget(avg_bits=(4 * layers + 3 * high) / (2 * layers)))
    assert sum(each.k.bits == 3 for each in plan.layers.values()) == high


def test_ties_go_to_the_earlier_layer():
    plan = allocate(make_profile([1.0, 5.0, 1.0, 1.0]), Budget(avg_bits=2.75))
    assert plan.short == "0-1:k3v4,2-3:k2v2"


def test_only_layers_that_can_be_quantized_are_planned():
    info = make_info(6, stock={1: "sliding_attention", 4: "linear_attention"})
    plan = allocate(make_profile([1.0, 2.0, 3.0, 4.0], info=info), Budget(avg_bits=2.5))
    assert list(plan.layers) == [0, 2, 3, 5]
    assert plan.bits.nominal == 2.375


def test_same_question_same_answer_to_the_byte():
    first, second = (allocate(falling(17), Budget(avg_bits=2.4)).to_yaml() for _ in range(2))
    assert first == second


def test_provenance_says_how_to_make_it_again():
    profile = falling(8)
    plan = allocate(profile, Budget(avg_bits=2.4))
    assert plan.provenance["method"] == "rank"
    assert plan.provenance["score"] == "grad-norm"
    assert plan.provenance["budget"] == {"avg_bits": 2.4}
    assert plan.provenance["profile_sha256"] == profile.sha256
    assert "seed" not in plan.provenance


@pytest.mark.parametrize("asked", [0, -1, 1.99, 99, 8.01, float("nan"), float("inf"), float("-inf")])
def test_impossible_average_states_the_reachable_range(asked):
    with pytest.raises(BudgetError, match=r"reach 2 to 8; widen the range with --k-bits and --v-bits"):
        allocate(falling(8), Budget(avg_bits=asked))


def test_impossible_stored_bits_state_the_reachable_range():
    with pytest.raises(BudgetError, match=r"2.2 stored bits.* reach 2.5 to 8.5; .*--group-size"):
        allocate(falling(8), Budget(stored_bits=2.2))


def test_impossible_memory_states_the_smallest_and_the_largest():
    with pytest.raises(BudgetError, match=r"1 KiB at 4096 tokens x 2.* take .* MiB to .* MiB; lower .*--context or"):
        allocate(falling(8), Budget(memory=1024, context=4096, batch=2))


def test_more_memory_than_any_plan_needs_is_no_error():
    assert allocate(falling(8), Budget(memory=2**60)).bits.nominal == 8


@pytest.mark.parametrize("k_bits", [(), (2, 5), (0,), (32,)])
def test_unknown_widths_are_refused(k_bits):
    with pytest.raises(BudgetError, match="k_bits must be taken from 1, 2, 3, 4, 8, 16"):
        allocate(falling(4), Budget(avg_bits=3), k_bits=k_bits)


def test_order_and_repetition_of_a_ladder_do_not_matter():
    plain, messy = (allocate(falling(9), Budget(avg_bits=3), k_bits=k, v_bits=(2, 4)) for k in [(2, 3), (3, 2, 3)])
    assert plain == messy


def test_two_limits_are_refused():
    with pytest.raises(BudgetError, match="avg_bits, memory"):
        Budget(avg_bits=2, memory=10)


@pytest.mark.parametrize("sizes", [{"context": 0}, {"batch": 0}])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(BudgetError, match="at least 1"):
        Budget(memory=10, **sizes)


def test_unknown_score_names_the_ones_there_are():
    with pytest.raises(DocumentError, match="no score 'loss', only grad-norm"):
        allocate(falling(4), Budget(avg_bits=3), score="loss")


@pytest.mark.parametrize("budget_", [Budget(avg_bits=3), Budget(stored_bits=5), Budget(memory=2**30)])
def test_heads_that_cannot_be_packed_are_an_error(budget_):
    profile = make_profile([1.0, 2.0], info=make_info(2, head_dim=40))
    with pytest.raises(PlanError, match="multiple of 16, got 40"):
        allocate(profile, budget_)


def test_full_precision_on_the_ladder():
    plan = allocate(falling(4), Budget(avg_bits=9), k_bits=(2, 16), v_bits=(2, 16), cache=CacheSettings(page=16))
    assert plan.short == "0-1:k16v2,2-3:k2v16"
