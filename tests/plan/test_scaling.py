"""Presets at a size that is asked for: what fits, what each of them keeps of itself, and what cannot be reached."""

import pytest
from made_up import make_info

from kvmix_cli.errors import PlanError
from kvmix_cli.plan.presets import Preset, find_preset, presets
from kvmix_cli.plan.presets.scaling import LAYOUT, SLACK, room, scaled
from kvmix_cli.plan.sizes import FULL_PRECISION_BITS

INFO = make_info(12)
SIZES = (2.0, 2.5, 3.0, 4.0)
CONTEXT = 4096
STATED = tuple(name for name in presets() if find_preset(name).bits is not None)
BUDGETS = tuple(name for name in STATED if (tokens := find_preset(name).cache.tokens) and tokens.keep)
REFUSED = {("minikv", 3.0), ("minikv", 4.0), ("cocktail", 2.0), ("qaq", 2.0), ("zipcache", 2.0)}
"""Sizes that a preset cannot reach in 12 layers with heads of 64."""


def plan_of(name, size, info=INFO):
    return scaled(find_preset(name), name, info, size, CONTEXT)


@pytest.mark.parametrize("name", STATED)
def test_every_preset_fills_every_size_or_says_why_not(name):
    for size in SIZES:
        if (name, size) in REFUSED:
            with pytest.raises(PlanError, match=f"preset '{name}' has no plan of {size:g} stored bits: .* take"):
                plan_of(name, size)
            continue
        plan = plan_of(name, size)
        if name in BUDGETS:
            most = room(INFO, size, CONTEXT)
            assert 0.85 * most < plan.cache_bytes(CONTEXT).total <= most
        else:
            assert size - 0.3 < plan.bits.stored <= size + SLACK


@pytest.mark.parametrize("name", STATED)
def test_what_a_preset_does_stays_what_it_is(name):
    preset = find_preset(name).cache
    cache = plan_of(name, 2.5).cache
    assert cache.transforms == preset.transforms
    assert cache.encode == preset.encode
    assert (cache.tokens is None, cache.channels is None) == (preset.tokens is None, preset.channels is None)
    if preset.tokens is not None:
        kept = ("score", "when", "granularity", "merge", "weigh")
        assert [getattr(cache.tokens, each) for each in kept] == [getattr(preset.tokens, each) for each in kept]
        assert [tier.share for tier in cache.tokens.tiers] == [tier.share for tier in preset.tokens.tiers]
    if preset.channels is not None:
        assert [run.share for run in cache.channels.runs] == [run.share for run in preset.channels.runs]
    if name not in BUDGETS:
        assert (cache.sink, cache.window.tokens) == (LAYOUT["sink"], LAYOUT["window"]["tokens"])


def test_a_context_that_would_be_read_whole_is_refused():
    with pytest.raises(PlanError, match="preset 'quest' reads 2048 tokens a step, which is all of a context of 2048"):
        scaled(find_preset("quest"), "quest", INFO, 3.0, 2048)


@pytest.mark.parametrize("name", ["mikv", "zipcache", "zipvl", "cocktail"])
@pytest.mark.parametrize("size", [2.5, 3.0, 4.0])
def test_tiers_stay_wider_than_their_layers_and_in_order(name, size):
    plan = plan_of(name, size)
    for layer in plan.layers.values():
        for of in "kv":
            widths = [max(getattr(tier, of), getattr(layer, of).bits) for tier in plan.cache.tokens.tiers]
            assert widths == sorted(widths, reverse=True)
            assert widths[-1] >= getattr(layer, of).bits
    narrow = min(layer.k.bits for layer in plan.layers.values())
    assert all(tier.k > narrow for tier in plan.cache.tokens.tiers)


def test_widths_are_raised_for_keys_before_values():
    assert [plan_of("kivi-2", size).short for size in SIZES] == ["0-11:k2v1", "0-11:k2v2", "0-11:k3v2", "0-11:k4v3"]
    assert plan_of("asymkv", 2.0).short == "0-5:k3v1,6-11:k1v1"


def test_between_two_widths_the_first_layers_have_the_wider_one():
    plan = plan_of("kivi-2", 2.3)
    assert plan.short == "0-6:k2v2,7-11:k2v1"
    assert plan.bits.stored <= 2.3 < plan_of("kivi-2", 2.34).bits.stored


def test_a_share_to_evict_keeps_its_slope_over_the_layers():
    shares = [layer.tokens.evict for layer in plan_of("minikv", 2.0).layers.values()]
    first, last = sum(shares[:6]) / 6, sum(shares[6:]) / 6
    assert last - first == pytest.approx(0.428 / 2, abs=0.05)


def test_layers_that_keep_all_tokens_still_do():
    """At the preset's own widths, or narrower ones where these layers would take all the room."""
    for size, layers, short in ((2.0, 8, "0-7:k4v3"), (2.5, 8, "0-7:k4v4"), (2.0, 32, "0-31:k4v4")):
        plan = plan_of("d2o", size, make_info(layers))
        shares = [layer.tokens.evict for layer in plan.layers.values()]
        assert plan.short == short
        assert shares[:2] == [0.0, 0.0]
        assert shares[-1] == 0.0
        assert min(shares[2:-1]) >= 0.5


@pytest.mark.parametrize("name", BUDGETS)
def test_a_number_of_tokens_grows_with_its_size_and_the_window_with_it(name):
    numbers, windows = [], []
    for size in SIZES:
        plan = plan_of(name, size)
        numbers.append(sum(layer.tokens.keep for layer in plan.layers.values()))
        windows.append(plan.cache.window.tokens)
        assert all(layer.k.bits == FULL_PRECISION_BITS for layer in plan.layers.values())
    assert numbers == sorted(numbers)
    assert windows == sorted(windows)
    assert windows[0] < windows[-1]


def test_room_is_what_equal_widths_take_in_the_mean_over_contexts():
    plan = plan_of("kivi-2", 2.5)
    contexts = range(CONTEXT, CONTEXT + 64)
    mean = sum(plan.cache_bytes(context).total / room(INFO, 2.5, context) for context in contexts) / len(contexts)
    assert mean == pytest.approx(1, abs=0.005)


def test_what_a_profile_decides_has_no_widths_to_scale():
    with pytest.raises(PlanError, match="preset 'transform-2' states no widths: a profile decides them"):
        plan_of("transform-2", 3.0)


def test_a_preset_file_of_ones_own_is_scaled_like_the_others(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("format: kvmix-preset/1\nbits: {k: 8, v: 8}\ncache: {page: 64, tokens: {evict: 0.5, flush: 128}}\n")
    plan = scaled(Preset.load(path), "mine", INFO, 3.0, CONTEXT)
    assert plan.short == "0-11:k8v8"
    assert 2.8 < plan.bits.stored <= 3.005
