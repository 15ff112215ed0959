"""Explanations as a study: called from Python, they return reasons and notices, and print nothing."""

from pathlib import Path

import pytest
from curves import curved, make_score
from made_up import falling, make_info

from kvmix_cli.allocation import Budget, allocate
from kvmix_cli.errors import BudgetError, PlanError
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.profile import Profile
from kvmix_cli.studies.explain import explain_plan

PATH = Path("profile.yaml")


@pytest.fixture
def profile():
    """A profile of four layers with a ranking, and with a score that predicts loss."""
    predicting = curved(4, head_dim=64)
    return predicting.model_copy(update={"scores": {**falling(4).scores, **predicting.scores}})


def test_the_score_that_decided_and_the_one_that_predicts(profile, capsys):
    plan = allocate(profile, Budget(avg_bits=3), method="rank")
    found = explain_plan(plan, profile, PATH)
    assert (found.importance, found.prediction) == ("grad-norm", "loss")
    assert [keys.layer for keys, _ in found.layers] == [0, 1, 2, 3]
    assert found.notices == ()
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_the_frontier_is_not_above_the_plan(profile):
    found = explain_plan(allocate(profile, Budget(stored_bits=3), method="ilp"), profile, PATH)
    frontier = found.frontier()
    bits, loss = frontier.plan
    assert loss == pytest.approx(found.loss)
    assert min(best for stored, best in frontier.best if stored <= bits) == pytest.approx(loss), "ilp is on it"


def test_there_is_no_frontier_without_a_prediction_or_for_what_was_not_measured():
    plan = Plan.uniform(make_info(2), 2, 2)
    assert explain_plan(plan, falling(2), PATH).frontier() is None
    score = make_score([{"2g64": 0.5}] * 2, [{"2g64": 0.5}] * 2)
    narrow = Profile(model=make_info(2), scores={"loss": score})
    with pytest.raises(BudgetError, match="was not measured for keys"):
        explain_plan(plan, narrow, PATH).frontier()


def test_another_profile_and_other_settings_are_noticed(profile):
    plan = allocate(profile, Budget(stored_bits=3), method="ilp", cache=CacheSettings(page=64))
    other = curved(4, head_dim=64, seed=1, setup={"page": 128})
    first, second = explain_plan(plan, other, PATH).notices
    assert first.startswith("profile.yaml is not the profile that the plan was made from")
    assert second == "loss was measured with other settings than the plan's: page 64 instead of 128"


def test_a_profile_of_another_model(profile):
    with pytest.raises(PlanError, match="the plan was made for"):
        explain_plan(Plan.uniform(make_info(5), 2, 2), profile, PATH)
