"""A number at a chosen depth of a long text, asked for at its end."""

import dataclasses
from collections import Counter

import pytest
from chatty import chatty
from evaluating import tiny, uniform

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError, TextError
from kvmix_cli.evaluation import get_task
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.grid import grid
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.tasks.facts import as_chat_or_code
from kvmix_cli.evaluation.tasks.passkey import exercise

SETTINGS = Settings(length=300, limit=6)
POOL = [300, 301, 302] * 200


def make(length=300, depth=0.5, seed="0", loaded=None):
    return exercise(as_chat_or_code((loaded or tiny()).tokenizer), POOL, length, seed, depth)


@pytest.mark.parametrize("loaded", [tiny(), chatty()], ids=["code", "chat"])
@pytest.mark.parametrize("depth", [0.0, 1 / 3, 1.0])
def test_the_value_stands_at_its_depth_and_where_the_exercise_says(loaded, depth):
    made = make(depth=depth, loaded=loaded)
    (question,) = made.questions
    assert len(made.ids) + len(made.script) == 300
    assigned = len(made.ids) + question.answer.start - question.distance
    length = question.answer.stop - question.answer.start
    assert made.ids[assigned : assigned + length] == made.script[question.answer]
    text = loaded.tokenizer.decode(made.script[question.answer])
    assert text == f" {question.value}"
    assert len(question.value) == 4
    hay = [place for place, token in enumerate(made.ids) if token in POOL]
    before = sum(place < assigned for place in hay)
    assert before == round(depth * len(hay))
    assert question.depth == depth
    assert len(hay) >= 150


def test_a_model_without_a_chat_template_is_asked_in_code():
    made = make(depth=1.0)
    (question,) = made.questions
    line = f"\n{question.name} = {question.value}\n"
    assert tiny().tokenizer.decode(made.ids).endswith(line)
    assert tiny().tokenizer.decode(made.script) == f"\nassert {question.name} == {question.value}\n"


def test_a_chat_model_is_asked_in_a_turn_of_its_own_and_its_answer_is_begun():
    made = make(depth=0.0, loaded=chatty())
    (question,) = made.questions
    context, script = (chatty().tokenizer.decode(ids) for ids in (made.ids, made.script))
    assert context.startswith("<user>Below, a number is given")
    assert f"\nThe number of {question.name} is {question.value}.\n" in context
    before, after = script.split("</user><model>")
    assert before.startswith(f"\n\nWhat is the number of {question.name}?")
    assert after == f"The number of {question.name} is {question.value}.\n"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("nothing of the user's", "leaves out what the user says"),
        (
            "{{ raise_exception('no system turn') }}",
            "of the model cannot be used: no system turn.* or use --task recall",
        ),
        ("{{ broken", "cannot be used"),
        ("{% for part in messages[0].content %}{{ part.text }}{% endfor %}", "leaves out what the user says"),
    ],
)
def test_a_chat_template_that_is_of_no_use_is_an_error(template, said):
    with pytest.raises(EvaluationError, match=said):
        get_task("passkey").samples(chatty(template), SETTINGS)


def test_every_place_is_tried_once_before_any_is_tried_twice():
    task = get_task("passkey", {"contexts": (200, 320), "depths": 4})
    assert task.limit(Settings()) == 2 * 4 * 3
    samples = task.samples(tiny(), Settings(limit=20))
    places = [(len(one.ids) + len(one.script), one.questions[0].depth) for one in samples]
    assert set(Counter(places[:8]).values()) == {1}
    assert set(Counter(places[:16]).values()) == {2}
    assert {depth for _, depth in places} == {0, 1 / 3, 2 / 3, 1}
    assert len({one.questions[0].value for one in samples}) > 15


def test_a_single_depth_is_the_middle():
    samples = get_task("passkey", {"depths": 1}).samples(tiny(), SETTINGS)
    assert {sample.questions[0].depth for sample in samples} == {0.5}


def test_a_seed_makes_the_same_exercises_and_another_seed_others():
    first, again, other = (
        get_task("passkey").samples(tiny(), dataclasses.replace(SETTINGS, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert not {one.questions[0].name for one in first} & {one.questions[0].name for one in other}


def test_too_short_an_exercise_says_how_long_it_must_be():
    with pytest.raises(EvaluationError, match=r"30 tokens are too short for passkey: .* use at least \d+") as caught:
        make(length=30)
    needed = int(str(caught.value).split()[-1])
    made = make(length=needed)
    assert len(made.ids) + len(made.script) == needed


def test_text_that_does_not_fill_it_and_a_length_beyond_the_model_are_errors(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("a few words only")
    with pytest.raises(TextError, match="do not fill an exercise of 300"):
        get_task("passkey").samples(tiny(), dataclasses.replace(SETTINGS, text=str(text)))
    with pytest.raises(EvaluationError, match="--contexts 5000 is more than the model's limit of 4096"):
        get_task("passkey", {"contexts": (5000,)}).samples(tiny(), SETTINGS)


@pytest.mark.slow
def test_the_model_finds_it_through_its_own_cache_and_not_through_one_bit():
    subjects = [Subject("full", uniform(16)), Subject("one", uniform(1))]
    report = run_task(get_task("passkey", {"depths": 3}), tiny(), subjects, SETTINGS)
    reference, full, one = report.rows
    assert reference.value("passkey") == 1
    assert reference.metrics["passkey"].low < 1
    assert full.metrics == reference.metrics
    assert one.value("passkey") < 0.5
    assert one.quantized_share > 0.9
    found = grid(one.records)
    assert found.rows == ("0%", "50%", "100%")
    assert found.columns == ("300",)
    assert sum(cell.recalled for row in found.cells for cell in row) == 6 * one.value("passkey")
