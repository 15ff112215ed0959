"""Names that are defined far back in code: in modules that are made up, and in a user's own files."""

import ast
import re

import pytest
from evaluating import tiny, uniform

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError, TextError
from kvmix_cli.evaluation import get_task
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.tasks.code_completion import UserCode, exercise

SETTINGS = Settings(length=400, limit=4)


def text_of(ids):
    return tiny().tokenizer.decode(ids)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_import_asks_for_the_function_of_its_module(depth):
    made = exercise(tiny().tokenizer, 900, "0", depth)
    assert len(made.ids) + len(made.script) == 900
    context = text_of(made.ids)
    ast.parse(context)
    modules = re.findall(r"^# (\w+)/(\w+)\.py\ndef (\w+)\(", context, re.MULTILINE)
    assert len(modules) == len(set(modules)) > 5
    (question,) = made.questions
    asked = next(index for index, (folder, file, _) in enumerate(modules) if f"{folder}.{file}" == question.name)
    assert asked == round(depth * (len(modules) - 1))
    assert modules[asked][2] == question.value
    assert text_of(made.script).strip() == f"# main.py\nfrom {question.name} import {question.value}"
    assert text_of(made.script[question.answer]) == f" {question.value}"
    stated = len(made.ids) + question.answer.start - question.distance
    assert made.ids[stated : stated + len(made.script[question.answer])] == made.script[question.answer]


def test_a_few_modules_must_fit():
    with pytest.raises(EvaluationError, match=r"too short for code_completion: 4 functions and the question") as error:
        exercise(tiny().tokenizer, 60, "0", 0.5)
    assert exercise(tiny().tokenizer, int(str(error.value).split()[-1]), "0", 0.5)


def library(functions=40, apart=10):
    """A user's code: every function is called again after `apart` others, and nowhere before."""
    names = [f"load_{'abcdefghij'[i // 10]}_{'klmnopqrst'[i % 10]}_rows" for i in range(functions + apart)]
    parts = []
    for index, name in enumerate(names):
        call = f"    found = {names[index - apart]}(path)\n" if index >= apart else "    found = list(path)\n"
        parts.append(f"def {name}(path):\n{call}    return sorted(found)\n")
    return "\n".join(parts)


def test_in_a_users_code_a_use_asks_for_the_rest_of_a_name_whose_definition_is_far_back():
    code = UserCode("mine", library(), tiny().tokenizer)
    for seed in map(str, range(4)):
        made = code.exercise(400, seed, 0.2)
        assert len(made.ids) + len(made.script) == 400
        (question,) = made.questions
        context = text_of(made.ids)
        assert context in code.text, "it is the user's own text, as it is"
        assert text_of(made.script) == f" {question.name}"
        assert code.text.split(context)[1].startswith(f" {question.name}")
        assert context.count(question.name) == 1
        assert re.search(rf"def {question.name}\(", context)
        given = text_of(made.script[: question.answer.start]).strip()
        names = set(re.findall(r"\w+", context[context.index(question.name) + len(question.name) :]))
        assert given and not any(other.startswith(given) for other in names)
        assert question.answer.stop == len(made.script) > question.answer.start
        assert 100 <= question.distance <= 400


def test_the_definition_is_about_as_deep_as_asked_for():
    code = UserCode("mine", library(80, 5) + library(40, 20).replace("load", "save"), tiny().tokenizer)
    near, far = (code.exercise(800, "0", depth).questions[0] for depth in (0.75, 0.0))
    assert near.distance < far.distance
    assert near.depth > far.depth


@pytest.mark.parametrize("text", ["No code at all, only words. " * 400, "def name_of_rows():\n    pass\n" * 100])
def test_text_without_such_names_is_an_error(text, tmp_path):
    (tmp_path / "a.py").write_text(text)
    settings = Settings(length=256, text=str(tmp_path))
    with pytest.raises(TextError, match=r"has no name that is defined, and first used again 64 to 256 tokens later"):
        get_task("code_completion").samples(tiny(), settings)


def test_a_folder_of_code_is_taken_with_text(tmp_path):
    (tmp_path / "a.py").write_text(library())
    task, settings = get_task("code_completion", {"depths": 2}), Settings(length=300, limit=4, text=str(tmp_path))
    samples = task.samples(tiny(), settings)
    assert len(samples) == 4
    assert all(len(sample.ids) + len(sample.script) == 300 for sample in samples)
    assert f"{tmp_path}, code" in task.describe(samples, settings)


@pytest.mark.slow
def test_an_exercise_is_read_through_the_cache():
    report = run_task(get_task("code_completion"), tiny(), [Subject("full", uniform(16))], SETTINGS)
    reference, full = report.rows
    assert full.metrics == reference.metrics
    assert "4 values in 4 exercises of 400 tokens of made-up modules" in report.description
