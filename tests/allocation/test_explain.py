"""Reasons: what a plan's tensors are predicted to cost, and the upgrade that is worth most, against trying them all."""

import pytest
from curves import curved, make_score, small, stored
from hypothesis import given
from hypothesis import strategies as st
from made_up import falling, make_info, patient

from kvmix_cli.allocation import predicted_loss
from kvmix_cli.allocation.explain import explain, next_upgrade
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TensorPlan

TENSORS = st.builds(TensorPlan, bits=st.sampled_from([2, 3, 4, 16]), group_size=st.sampled_from([None, 32]))


@st.composite
def planned(draw):
    """A profile, and any plan in the choices that it has curves for."""
    profile = draw(small())
    layers = {layer: LayerPlan(k=draw(TENSORS), v=draw(TENSORS)) for layer in profile.model.quantizable}
    return profile, Plan.build(profile.model, layers, CacheSettings())


def changed(plan, reason, tensor):
    """The plan with another choice for one tensor."""
    layer = plan.layers[reason.layer].model_copy(update={reason.kind[0]: tensor})
    return Plan.build(plan.model, {**plan.layers, reason.layer: layer}, plan.cache)


@patient
@given(planned())
def test_the_losses_add_up_to_the_plans(case):
    profile, plan = case
    reasons = explain(plan, profile.scores["loss"], profile.scores["loss"])
    assert [(each.layer, each.kind) for each in reasons] == [
        (n, kind) for n in plan.layers for kind in ("key", "value")
    ]
    assert sum(each.loss for each in reasons) == pytest.approx(predicted_loss(plan, profile.scores["loss"]))


@patient
@given(planned())
def test_an_upgrade_saves_and_costs_what_the_plan_with_it_does(case):
    profile, plan = case
    score = profile.scores["loss"]
    for reason in explain(plan, score, score):
        if reason.upgrade is not None:
            other = changed(plan, reason, reason.upgrade.tensor)
            saved = predicted_loss(plan, score) - predicted_loss(other, score)
            assert reason.upgrade.saves == pytest.approx(saved)
            assert reason.upgrade.costs == pytest.approx(stored(profile, other.layers) - stored(profile, plan.layers))
            assert min(reason.upgrade.saves, reason.upgrade.costs) > 0


@pytest.mark.slow
@patient
@given(planned())
def test_no_other_choice_for_one_tensor_is_worth_more_than_the_next_upgrade(case):
    profile, plan = case
    score = profile.scores["loss"]
    reasons = explain(plan, score, score)
    best = next_upgrade(reasons)
    sizes = {tensor.group_size for layer in plan.layers.values() for tensor, _ in layer.tensors}
    for reason in reasons:
        for tensor in [*(TensorPlan(bits=b, group_size=g) for b in (2, 3, 4) for g in sizes), TensorPlan(bits=16)]:
            other = changed(plan, reason, tensor)
            costs = stored(profile, other.layers) - stored(profile, plan.layers)
            saves = predicted_loss(plan, score) - predicted_loss(other, score)
            if costs > 0 and saves > 1e-12:
                assert best is not None
                assert best.upgrade.worth >= saves / costs - 1e-9


def test_importance_comes_from_the_score_that_decided():
    profile = curved(8)
    plan = Plan.uniform(make_info(8, head_dim=128), 2, 2)
    reasons = explain(plan, falling(8).scores["grad-norm"], profile.scores["loss"])
    assert [each.importance for each in reasons[::2]] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert [each.importance for each in reasons[1::2]] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_without_a_prediction_there_is_importance_alone():
    reasons = explain(Plan.uniform(make_info(8), 2, 2), falling(8).scores["grad-norm"], None)
    assert {(each.loss, each.upgrade) for each in reasons} == {(None, None)}
    assert next_upgrade(reasons) is None


def test_a_choice_that_the_curves_do_not_know_is_not_explained():
    known = make_score([{"2g64": 0.5}], [{"2g64": 0.25, "4g64": 0.1}])
    reasons = explain(Plan.uniform(make_info(1), 4, 4), known, known)
    assert [each.loss for each in reasons] == [None, 0.1]
    assert [each.upgrade and each.upgrade.tensor.bits for each in reasons] == [None, 16]


def test_in_full_precision_nothing_is_left_to_save():
    profile = curved(4)
    reasons = explain(Plan.uniform(profile.model, 16, 16), profile.scores["loss"], profile.scores["loss"])
    assert {(each.loss, each.upgrade) for each in reasons} == {(0.0, None)}


def test_a_group_longer_than_a_row_is_no_choice_of_its_own():
    profile = curved(4, head_dim=64)
    layers = {n: LayerPlan(k=TensorPlan(bits=2, group_size=128), v=TensorPlan(bits=2)) for n in range(4)}
    plan = Plan.build(profile.model, layers, CacheSettings(group_size=64))
    reasons = explain(plan, profile.scores["loss"], profile.scores["loss"])
    values = [each.upgrade.tensor for each in reasons if each.kind == "value"]
    assert len(values) == 4
    assert {tensor.group_size for tensor in values} == {None}
