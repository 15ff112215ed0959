"""The answer in words: safe, worse, cannot tell, and nothing read, each with its numbers and its margin."""

from pathlib import Path

import pytest
from evaluating import INFO, uniform
from reporting import FOUR, PERPLEXITY, TWO, Scripted, measured, memory, perplexity, recall

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.collect import collect
from kvmix_cli.evaluation.results import Metric
from kvmix_cli.reporting.tables.verdict import answers, tokens, verdicts


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def increase(percent, low, high):
    """A task in which every plan has this increase of perplexity."""
    numbers = {"perplexity": 10.0, "perplexity_increase_percent": (percent, low, high)}
    return perplexity({"unquantized": {"perplexity": 10.0}, "four": numbers})


def score(own, reference, name="score", **more):
    """A task with a number of its own."""
    numbers = {name: own, **more}
    metrics = tuple(Metric(each, True, plans_only=each.endswith("_change")) for each in numbers)
    return Scripted(name, metrics, lambda who: {name: reference} if who == "unquantized" else numbers)


def told(*tasks, subjects=(FOUR,), **options):
    """Verdicts of a folder in which these tasks were measured."""
    for task in tasks:
        measured(Path("results"), task, subjects, **options)
    (group,) = collect([Path("results")]).groups
    return verdicts(group)


def test_safe_says_its_numbers_its_margins_and_how_far_it_was_tested():
    (found,) = told(
        increase(0.4, 0.1, 0.7), recall(40, {"unquantized": 9, "four": 10}, 4096), settings=Settings(length=4096)
    )
    assert (found.outcome, found.text) == (
        "safe",
        "four at 6 stored bits: +0.40 % perplexity [+0.10, +0.70], recall 230 of 240 against 231: safe at 4K, "
        "not tested beyond (with 95 % confidence at most 1 % more perplexity and 5 % fewer values of recall)",
    )


def test_safe_at_the_shortest_context_says_what_was_tested_beyond_it():
    (found,) = told(increase(0.4, 0.1, 0.7), recall(10, {}, 4096))
    assert "[+0.10, +0.70] at 1K, recall 60 of 60 against 60 at 4K: safe at 1K; up to 4K only recall" in found.text


def test_worse_says_in_what_and_what_would_be_safe():
    (found,) = told(increase(3, 2, 4), recall(10, {"four": 6}))
    assert (found.outcome, found.text) == (
        "worse",
        "four at 6 stored bits: +3.00 % perplexity [+2.00, +4.00], recall 54 of 60 against 60: worse in perplexity "
        "(safe would be at most 1 % more perplexity)",
    )
    (found,) = told(increase(0.4, 0.1, 0.7), recall(10, {"four": 30}))
    assert found.outcome == "worse"
    assert "worse in recall (safe would be at most 5 % fewer values of recall)" in found.text


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (increase(0.5, -0.3, 1.4), "cannot tell, it may be more than 1 % more perplexity; measure more with a larger"),
        (increase(0.8, 0.2, 1.4), "cannot tell, it may be more than 1 % more perplexity"),
        (recall(2, {}), "recall 12 of 12 against 12: cannot tell, 12 values of recall cannot show a loss of 5 %"),
        (recall(10, {"four": 4}), "recall 56 of 60 against 60: cannot tell, it may be more than 5 % fewer values"),
        (score(0.5, 0.5), "cannot tell, score has no interval"),
    ],
)
def test_cannot_tell_says_why(task, why):
    (found,) = told(task)
    assert found.outcome == "cannot tell"
    assert why in found.text


def divergence(value, low, high):
    """A task in which every plan has this KL, and a perplexity that has got better."""
    kl = (Metric("kl", higher_is_better=False, unit="nats/token", plans_only=True),)
    numbers = {"perplexity": 10.0, "perplexity_increase_percent": (-0.1, -0.2, 0.1), "kl": (value, low, high)}
    known = {"unquantized": {"perplexity": 10.0}, "four": numbers}
    return Scripted("perplexity", PERPLEXITY + kl, lambda name: known[name])


@pytest.mark.parametrize(
    ("numbers", "outcome", "said"),
    [
        (
            (0.004, 0.003, 0.006),
            "safe",
            "four at 6 stored bits: KL 0.004 [0.003, 0.006] nats a token: safe at 1K, not tested beyond (with 95 % "
            "confidence at most a KL of 0.01 nats a token)",
        ),
        (
            (0.02, 0.015, 0.03),
            "worse",
            "four at 6 stored bits: KL 0.02 [0.015, 0.03] nats a token: worse in KL (safe would be at most a KL of "
            "0.01 nats a token)",
        ),
        ((0.009, 0.006, 0.013), "cannot tell", "cannot tell, it may be more than a KL of 0.01 nats a token"),
        ((0.012, 0.009, 0.014), "cannot tell", "cannot tell, it may be more than a KL of 0.01 nats a token"),
    ],
)
def test_where_kl_was_measured_it_decides_and_not_perplexity(numbers, outcome, said):
    (found,) = told(divergence(*numbers))
    assert (found.outcome, said in found.text) == (outcome, True), found.text
    assert "perplexity" not in found.text


def test_one_document_has_no_interval_of_kl():
    (found,) = told(divergence(0.001, 0.001, 0.001), settings=Settings(limit=1))
    assert (found.outcome, "one sample of KL has no interval" in found.text) == ("cannot tell", True)


def test_one_sample_has_no_interval():
    (found,) = told(increase(0.1, 0.1, 0.1), settings=Settings(limit=1))
    assert found.outcome == "cannot tell"
    assert "one sample of perplexity has no interval" in found.text


@pytest.mark.parametrize(
    ("task", "outcome", "said"),
    [
        (score((0.50, 0.49, 0.51), (0.5, 0.49, 0.51)), "safe", "score 0.5 [0.49, 0.51] against 0.5: safe, as far as"),
        (score((0.3, 0.28, 0.32), (0.5, 0.48, 0.52)), "worse", "worse in score (safe would be at most 5 % less score)"),
        (score((0.48, 0.40, 0.56), (0.5, 0.4, 0.6)), "cannot tell", "it may be more than 5 % less score"),
        (score((0.49, 0.2, 0.8), (0.5, 0.2, 0.8), score_change=(-0.01, -0.02, 0.0)), "safe", "at most 5 % less score"),
    ],
)
def test_any_other_number_is_judged_by_its_paired_change_or_by_both_intervals(task, outcome, said):
    (found,) = told(task)
    assert (found.outcome, said in found.text) == (outcome, True), found.text


def test_nothing_quantized_read_says_nothing():
    task = increase(0.1, 0.0, 0.2)
    usual = task.measure
    task.measure = lambda *arguments: {**usual(*arguments), "attended": {"total": 100, "quantized": 0}}
    (found,) = told(task)
    assert (found.outcome, found.text) == (
        "nothing read",
        "four at 6 stored bits: nothing quantized was read in perplexity, which says nothing about it; use longer "
        "contexts",
    )
    (found,) = told(recall(10, {}))
    assert found.outcome == "safe"
    assert "; nothing quantized was read in perplexity, which says nothing" in found.text


def test_what_was_not_measured_is_no_verdict():
    (found,) = told(memory())
    assert found.outcome == "not measured"
    assert "no quality was measured" in found.text
    task = perplexity()

    def fail(subject, index):
        if subject is FOUR:
            raise EvaluationError("no memory is left")
        return {}

    task.record = fail
    (found,) = told(task)
    assert (found.outcome, "could not be measured (no memory is left)" in found.text) == ("not measured", True)


def test_the_first_answer_is_the_smallest_safe_plan():
    numbers = {
        name: {"perplexity": 10.0, "perplexity_increase_percent": (value, value - 0.1, value + 0.1)}
        for name, value in {"four": 0.1, "two": 0.8, "one": 5.0}.items()
    }
    one = Subject("one", uniform(1, info=INFO))
    found = told(perplexity({"unquantized": {"perplexity": 10.0}, **numbers}), subjects=(FOUR, one, TWO))
    assert [(each.line.label, each.outcome) for each in found] == [("two", "safe"), ("four", "safe"), ("one", "worse")]


def test_every_group_has_its_answer():
    measured(Path("results"), increase(0.1, 0, 0.2), [FOUR])
    assert [text[:4] for text in answers(collect([Path("results")]))] == ["four"]
    measured(Path("other"), increase(3, 2, 4), [FOUR], info=INFO.model_copy(update={"id": "org/\x1bother"}))
    first, second = answers(collect([Path("results"), Path("other")]))
    assert first.startswith("builtin:tiny: four at 6 stored bits:") and "safe at 1K" in first
    assert second.startswith("org/?other: four at 6 stored bits:") and "worse in perplexity" in second


def test_without_plans_there_is_no_answer():
    measured(Path("results"), perplexity(), [])
    assert answers(collect([Path("results")])) == ["no plan was measured, only the unquantized cache"]


@pytest.mark.parametrize(("count", "text"), [(4096, "4K"), (1000, "1000 tokens"), (131072, "128K"), (1, "1 token")])
def test_contexts_in_words(count, text):
    assert tokens(count) == text
