"""The leaderboard as a study: candidates, paired differences, rank correlations, and a board held from Python."""

import numpy as np
import pytest
from curves import curved
from evaluating import INFO, tiny, uniform
from hypothesis import given
from hypothesis import strategies as st
from made_up import falling, patient

from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.results import Estimate, Row
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.profile import Profile
from kvmix_cli.studies.leaderboard import hold
from kvmix_cli.studies.leaderboard.candidates import candidates, make_plans
from kvmix_cli.studies.leaderboard.standings import Standing, compare, rank_correlation


def standing(losses, reference, *, predicted=0.0, plan=None, name="plan"):
    """A standing with these sums of losses on documents of ten tokens, beside the unquantized ones."""
    increase = (sum(losses) - sum(reference)) / (10 * len(losses))
    records = tuple({"tokens": 10, "nll": loss} for loss in losses)
    row = Row("perplexity", name, 2.0, 2.5, metrics={"loss_increase": Estimate.exact(increase)}, records=records)
    return Standing(2.5, (name,), plan or uniform(2, info=INFO), {"perplexity": row}, {"loss": predicted})


def plan_of(number):
    """A plan that differs for different numbers."""
    widths = [(2, 3, 4, 8)[number // 4**place % 4] for place in range(8)]
    return Plan.from_short(",".join(f"{layer}:k{bits}v2" for layer, bits in enumerate(widths)), INFO)


def test_two_plans_are_compared_document_by_document():
    reference = [20.0, 30.0, 25.0, 40.0]
    first, second = [21.0, 33.0, 26.0, 41.0], [24.0, 35.0, 30.0, 47.0]
    found = compare(("a", standing(first, reference)), ("b", standing(second, reference)))
    differences = np.subtract(first, second) / 10
    assert found.difference.value == pytest.approx(differences.mean())
    assert differences.min() <= found.difference.low < found.difference.high <= differences.max()
    assert found.difference.high < 0, "better on every document"
    assert found.ratio == pytest.approx(6 / 21)
    assert (found.first, found.second, found.stored_bits) == ("a", "b", 2.5)


def test_what_all_documents_share_does_not_widen_the_interval():
    reference = [100.0, 1.0, 50.0]
    worse = compare(("a", standing([101, 2, 51], reference)), ("b", standing([102, 3, 52], reference)))
    assert (worse.difference.low, worse.difference.high) == (pytest.approx(-0.1), pytest.approx(-0.1))


def test_there_is_no_ratio_to_a_plan_that_loses_nothing():
    assert compare(("a", standing([2, 2], [1, 1])), ("b", standing([1, 1], [1, 1]))).ratio is None


def test_a_plan_that_could_not_be_measured_is_compared_with_nothing():
    broken = Standing(2.5, ("b",), uniform(2, info=INFO), {"perplexity": Row("perplexity", "b", 2, 2, error="NaN")})
    good = standing([1, 1], [1, 1])
    assert compare(("a", good), ("b", broken)) is compare(("b", broken), ("a", good)) is None


def ranks(values):
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


@pytest.mark.slow
@patient
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 5)), min_size=3, max_size=8))
def test_rank_correlation_is_the_correlation_of_ranks(pairs):
    standings = [
        standing([float(loss)], [0.0], predicted=float(guess), plan=plan_of(place))
        for place, (guess, loss) in enumerate(pairs)
    ]
    rho, plans = rank_correlation(standings, "loss")
    guesses, losses = (ranks(list(side)) for side in zip(*pairs, strict=True))
    assert plans == len(pairs)
    if len(set(guesses)) == 1 or len(set(losses)) == 1:
        assert rho is None
    else:
        assert rho == pytest.approx(np.corrcoef(guesses, losses)[0, 1])


def test_a_plan_that_stands_at_two_budgets_counts_once():
    standings = [standing([float(n)], [0.0], predicted=float(n), plan=plan_of(n)) for n in range(4)]
    assert rank_correlation([*standings, standings[0]], "loss") == (pytest.approx(1.0), 4)


def test_too_few_plans_or_none_that_is_predicted_say_nothing():
    standings = [standing([float(n)], [0.0], predicted=float(n), plan=plan_of(n)) for n in range(2)]
    assert rank_correlation(standings, "loss") == (None, 2)
    assert rank_correlation(standings, "taylor") == (None, 0)


def test_every_solver_with_every_score_is_a_candidate():
    profile = Profile(model=INFO, scores={**falling(8).scores, **curved(8, head_dim=64).scores})
    found, champion = candidates(profile, random_plans=1)
    names = ["paper", "rank loss", "ilp grad-norm", "ilp loss", "cut grad-norm", "cut loss", "uniform", "random 0"]
    assert [each.name for each in found] == names
    assert champion == "ilp loss"


def test_a_candidate_without_a_plan_is_left_out_with_the_reason():
    found, _ = candidates(curved(8, head_dim=64), methods=("ilp",), random_plans=0)
    plans, left_out = make_plans(curved(8, head_dim=64), found, (2.3, 3), CacheSettings(), (64, 128))
    assert [(each.stored_bits, each.name) for each in plans] == [(3, "ilp loss"), (3, "uniform")]
    assert {each.name for each in left_out} == {"ilp loss", "uniform"}
    assert all("no plan has 2.3 stored bits" in each.reason for each in left_out)


@pytest.mark.slow
def test_it_is_held_from_python_and_prints_nothing(capsys):
    profile = Profile(model=tiny().info, scores=curved(8, head_dim=64).scores)
    settings = Settings(length=450, prefix=400, limit=1)
    options = {"stored_bits": (3,), "methods": ("ilp",), "random_plans": 0}
    board = hold(profile, tiny, tasks=("perplexity",), settings=settings, **options)
    assert board.champion == "ilp loss"
    assert {name for each in board.standings for name in each.names} == {"ilp loss", "uniform"}
    assert [(each.first, each.second) for each in board.comparisons] == [("ilp loss", "uniform")]
    assert capsys.readouterr() == ("", "")
