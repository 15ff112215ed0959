"""Chains of names that a number is handed on along, and the number of whose end is asked for."""

import re

import pytest
from chatty import chatty
from evaluating import tiny, uniform

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError
from kvmix_cli.evaluation import get_task
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.tasks.facts import as_chat_or_code
from kvmix_cli.evaluation.tasks.multi_hop import CHAINS, exercise

SETTINGS = Settings(length=400, limit=2)
FILLER = " and so on"
CODE = r"^(\w+) = (\d{4}|\w+)$"
CHAT = r"^The number of (\w+) is (?:that of )?(\w+)\.$"


def make(length=400, hops=2, seed="0", loaded=None, places=None):
    loaded = loaded or tiny()
    pool = loaded.tokenizer(FILLER * 500, add_special_tokens=False).input_ids
    return exercise(as_chat_or_code(loaded.tokenizer), pool, hops, length, seed, places)


def followed(lines, name):
    """The number of a name, and how many other names lead to it: each line may use names of earlier lines only."""
    known = {}
    for left, right in lines:
        known[left] = (right, 0) if right.isdigit() else (known[right][0], known[right][1] + 1)
    return known[name]


@pytest.mark.parametrize(("loaded", "line"), [(tiny(), CODE), (chatty(), CHAT)], ids=["code", "chat"])
@pytest.mark.parametrize("hops", [1, 3])
def test_whoever_follows_the_chains_knows_every_answer(loaded, line, hops):
    made = make(1200, hops, loaded=loaded)
    assert len(made.ids) + len(made.script) == 1200
    text = loaded.tokenizer.decode(made.ids).replace(FILLER, "")
    lines = re.findall(line, text, re.MULTILINE)
    assert len(lines) == CHAINS * (hops + 1)
    assert len(made.questions) == CHAINS
    for question in made.questions:
        assert followed(lines, question.name) == (question.value, hops)


def test_distances_and_depths_are_those_of_the_number():
    made = make(600)
    for question in made.questions:
        stated = len(made.ids) + question.answer.start - question.distance
        length = question.answer.stop - question.answer.start
        assert made.ids[stated : stated + length] == made.script[question.answer]
        assert tiny().tokenizer.decode(made.script[question.answer]).strip() == question.value
        assert 0 <= question.depth <= 0.5


def test_numbers_stand_at_the_depths_asked_for():
    places = [0.0, 0.25, 0.5, 1.0]
    made = make(800, places=places)
    assert sorted(question.depth for question in made.questions) == places
    for question in made.questions:
        stated = len(made.ids) + question.answer.start - question.distance
        assert stated / len(made.ids) == pytest.approx(question.depth, abs=0.2)


def test_a_seed_makes_the_same_exercises_and_another_seed_others():
    assert make(seed="1") == make(seed="1") != make(seed="2")


def test_what_cannot_be_is_an_error():
    with pytest.raises(EvaluationError, match=r"--hops must be at least 1, got 0"):
        get_task("multi_hop", {"hops": 0}).samples(tiny(), SETTINGS)
    with pytest.raises(EvaluationError, match="too short for multi_hop: 4 chains of 3 names take") as error:
        make(100)
    assert make(int(str(error.value).split()[-1]))


def test_the_task_says_how_often_a_number_is_handed_on():
    task = get_task("multi_hop", {"hops": 1})
    samples = task.samples(tiny(), SETTINGS)
    assert "8 values in 2 exercises of 400 tokens of builtin text, handed on 1 time," in task.describe(
        samples, SETTINGS
    )


@pytest.mark.slow
def test_an_exercise_is_read_through_the_cache():
    report = run_task(get_task("multi_hop", {"hops": 1}), tiny(), [Subject("full", uniform(16))], SETTINGS)
    reference, full = report.rows
    assert full.metrics == reference.metrics
    assert [len(record["answers"]) for record in full.records] == [CHAINS, CHAINS]
