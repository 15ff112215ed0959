"""Curves: noise is smoothed, groups are what a row can hold, and a plan's loss is their sum."""

import math
from statistics import fmean

import pytest
from curves import curve, curved, make_score, naive_loss
from hypothesis import given
from hypothesis import strategies as st
from made_up import falling, make_info, patient

from kvmix_cli.allocation import other_settings, predicted_loss
from kvmix_cli.allocation.curves import Curves
from kvmix_cli.allocation.curves import falling as smoothed
from kvmix_cli.plan import CacheSettings, LayerPlan, ModelInfo, Plan, TensorPlan


def fitted(values, place):
    """Isotonic regression by its min-max formula (Robertson, Wright and Dykstra, 1988, section 1.4)."""
    ends = range(place + 1, len(values) + 1)
    return min(max(fmean(values[start:end]) for end in ends) for start in range(place + 1))


@patient
@given(st.dictionaries(st.sampled_from([1, 2, 3, 4, 8]), st.floats(-1, 1), min_size=1))
def test_smoothing_is_isotonic_regression_cut_off_at_zero(values):
    widths = sorted(values)
    ordered = [values[bits] for bits in widths]
    expected = [max(0.0, fitted(ordered, place)) for place in range(len(widths))]
    found = smoothed(values)
    assert [found[bits] for bits in widths] == pytest.approx(expected, abs=1e-12), "means in another order of adding"


def test_a_falling_curve_stays_as_it_is():
    assert smoothed({2: 0.5, 4: 0.25, 8: 0.0}) == {2: 0.5, 4: 0.25, 8: 0.0}


def layer(k, v):
    return {0: LayerPlan(k=k, v=v)}


def one_layer(k, v, *, page=128, head_dim=64, **options):
    score = make_score([k], [v], **options)
    return Curves(score, make_info(1, head_dim=head_dim), CacheSettings(page=page))


def test_groups_are_no_larger_than_a_row():
    """A page has 128 keys a row and a head 64 values, whatever the group size is called."""
    curves = one_layer({"2g64": 3.0, "2grow": 5.0}, {"2g128": 7.0})
    assert curves.at(0, "key", TensorPlan(bits=2, group_size=64)) == 3
    assert curves.at(0, "key", TensorPlan(bits=2, group_size="row")) == 5
    assert curves.at(0, "key", TensorPlan(bits=2, group_size=1000)) == 5
    assert {curves.at(0, "value", TensorPlan(bits=2, group_size=size)) for size in (64, 128, "row")} == {7}


def test_a_smaller_page_looks_up_smaller_groups():
    curves = one_layer({"2g32": 1.0, "2g64": 3.0}, {"2g64": 7.0}, page=32, setup={"page": 128})
    assert curves.at(0, "key", TensorPlan(bits=2, group_size=64)) == 1


def test_noise_is_smoothed_within_a_group_size_only():
    curves = one_layer({"2g32": 1.0, "3g32": 3.0, "2g64": 9.0, "3g64": -1.0}, {"2g64": 1.0})
    points = {(b, g): curves.at(0, "key", TensorPlan(bits=b, group_size=g)) for b in (2, 3) for g in (32, 64)}
    assert points == {(2, 32): 2, (3, 32): 2, (2, 64): 9, (3, 64): 0}


def test_full_precision_costs_nothing_and_what_was_not_measured_is_unknown():
    curves = one_layer({"2g64": 1.0}, {"2g64": 1.0})
    assert curves.at(0, "key", TensorPlan(bits=16)) == 0
    assert curves.at(0, "key", TensorPlan(bits=3)) is None
    assert curves.at(0, "key", TensorPlan(bits=2, group_size=32)) is None


def test_without_a_curve_the_error_of_a_uniform_quantizer_is_assumed():
    profile = falling(2)
    curves = Curves(profile.score("grad-norm"), profile.model, CacheSettings())
    assert not curves.measured
    assert curves.at(0, "key", TensorPlan(bits=3)) == pytest.approx(2.0**2 * math.log(64) / 49)
    assert curves.at(1, "key", TensorPlan(bits=16)) == 0


@pytest.mark.slow
@patient
@given(st.data(), st.sampled_from([(16, 64), (64, 64), (128, 128)]))
def test_predicted_loss_is_the_sum_over_the_plan(data, sizes):
    profile = curved(3, seed=data.draw(st.integers(0, 99)))
    tensors = st.builds(
        TensorPlan, bits=st.sampled_from([1, 2, 3, 4, 8, 16]), group_size=st.sampled_from([None, 32, 64, 128])
    )
    layers = {index: data.draw(st.builds(LayerPlan, k=tensors, v=tensors)) for index in range(3)}
    plan = Plan.build(profile.model, layers)
    assert predicted_loss(plan, profile.score("loss")) == pytest.approx(naive_loss(profile, layers), rel=1e-12)


def test_no_prediction_without_nats_or_for_what_was_not_measured():
    info = ModelInfo(id="org/model", layers=1, kv_heads=2, head_dim=64)
    values = curve(1.0, bits=(2, 4), groups=(64,))
    nats, error = make_score([values], [values]), make_score([values], [values], unit="relative error")
    known, unknown = (Plan.from_short(f"0:k2v{bits}", info) for bits in (4, 3))
    assert predicted_loss(known, nats) == pytest.approx(values["2g64"] + values["4g64"])
    assert predicted_loss(unknown, nats) is None
    assert predicted_loss(known, error) is None
    assert predicted_loss(Plan.uniform(make_info(2), 2, 2), nats) is None


def test_settings_that_differ_are_named():
    score = curved(1, setup={"page": 32, "scale_dtype": "bfloat16", "prefix": 4}).score("loss")
    assert other_settings(score, CacheSettings()) == [
        "page 128 instead of 32",
        "scale_dtype float16 instead of bfloat16",
    ]
    measured = CacheSettings(page=32, scale_dtype="bfloat16")
    assert other_settings(score, measured) == []
    fitted = measured.model_copy(update={"encode": "fitted"})
    assert other_settings(score, fitted) == ["encode fitted instead of minmax"]
    assert other_settings(curved(1, setup={"encode": "fitted"}).score("loss"), fitted) == []
