"""A context that is nothing but names and numbers, one of which is asked for."""

import dataclasses
import random
import re

import pytest
from chatty import chatty
from evaluating import tiny, uniform

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError
from kvmix_cli.evaluation import get_task
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.tasks.facts import WORDS, as_chat_or_code
from kvmix_cli.evaluation.tasks.kv_retrieval import exercise

SETTINGS = Settings(length=300, limit=6)


def make(length=300, depth=0.5, seed="0", loaded=None, lines=10):
    return exercise(as_chat_or_code((loaded or tiny()).tokenizer), lines, length, seed, depth)


@pytest.mark.parametrize(
    ("loaded", "line"),
    [(tiny(), r"^(\w+) = (\d{4})$"), (chatty(), r"^The number of (\w+) is (\d{4})\.$")],
    ids=["code", "chat"],
)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_context_is_lines_with_different_names_and_the_one_asked_for_is_at_its_depth(loaded, line, depth):
    made = make(length=600, depth=depth, loaded=loaded)
    assert len(made.ids) + len(made.script) == 600
    lines = re.findall(line, loaded.tokenizer.decode(made.ids), re.MULTILINE)
    names = [name for name, _ in lines]
    assert len(names) == len(set(names)) > 25
    (question,) = made.questions
    assert names.index(question.name) == round(depth * (len(names) - 1))
    assert dict(lines)[question.name] == question.value
    assigned = len(made.ids) + question.answer.start - question.distance
    length = question.answer.stop - question.answer.start
    assert made.ids[assigned : assigned + length] == made.script[question.answer]


@pytest.mark.parametrize("length", range(400, 425))
def test_what_no_line_fits_into_is_left_blank_at_the_beginning(length):
    made = make(length=length)
    assert len(made.ids) + len(made.script) == length
    text = tiny().tokenizer.decode(made.ids)
    assert len(text) - len(text.lstrip("\n")) < 20
    assert re.fullmatch(r"\n*(\w+ = \d{4}\n\n)+\w+ = \d{4}\n", text)


def test_where_pairs_of_words_run_out_names_have_three():
    pairs = len(WORDS.split()) * (len(WORDS.split()) - 1)
    facts = as_chat_or_code(tiny().tokenizer).facts(random.Random(0), pairs + 1)
    assert {next(facts).name.count("_") for _ in range(50)} == {2}


def test_as_many_lines_as_depths_must_fit():
    with pytest.raises(
        EvaluationError, match=r"100 tokens are too short .*: 10 lines and the question .* least \d+"
    ) as e:
        make(length=100)
    needed = int(str(e.value).split()[-1])
    made = make(length=needed)
    assert tiny().tokenizer.decode(made.ids).count("=") == 10
    with pytest.raises(EvaluationError, match="too short"):
        make(length=needed - 1)
    assert make(length=100, lines=3)


def test_a_seed_makes_the_same_exercises_and_another_seed_others():
    first, again, other = (
        get_task("kv_retrieval").samples(tiny(), dataclasses.replace(SETTINGS, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert not {one.ids for one in first} & {one.ids for one in other}


def test_depths_and_contexts_are_those_asked_for():
    task = get_task("kv_retrieval", {"contexts": (256, 300), "depths": 3})
    samples = task.samples(tiny(), SETTINGS)
    places = {(len(one.ids) + len(one.script), one.questions[0].depth) for one in samples}
    assert places == {(context, depth) for context in (256, 300) for depth in (0.0, 0.5, 1.0)}
    assert "6 values in 6 exercises of 256 and 300 tokens of names and numbers" in task.describe(samples, SETTINGS)


@pytest.mark.slow
def test_the_model_retrieves_through_its_own_cache_and_not_through_one_bit():
    subjects = [Subject("full", uniform(16)), Subject("one", uniform(1))]
    report = run_task(get_task("kv_retrieval"), tiny(), subjects, SETTINGS)
    reference, full, one = report.rows
    assert reference.value("kv_retrieval") >= 0.5
    assert full.metrics == reference.metrics
    assert one.value("kv_retrieval") < reference.value("kv_retrieval") / 2
    assert one.quantized_share > 0.9
