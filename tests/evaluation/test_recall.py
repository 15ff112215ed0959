import dataclasses
from types import SimpleNamespace

import pytest
import torch
from evaluating import stand_in, tiny, uniform
from transformers.cache_utils import DynamicCache

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError, TextError
from kvmix_cli.evaluation import get_task
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.tasks.needles import share
from kvmix_cli.evaluation.tasks.recall import VALUES, exercise
from kvmix_cli.texts.tokens import encode

SETTINGS = Settings(length=512, step=32, limit=2)
POOL = list(range(1000, 1400))


def make(length=400, seed="0"):
    return exercise(tiny().tokenizer, POOL * 3, length, seed)


class Spelling:
    """A tokenizer that opens every text with a special token and splits it by characters, unlike the built-in one."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(character) for character in text])


@pytest.mark.parametrize("tokenizer", [tiny().tokenizer, Spelling()], ids=["byte pairs", "characters"])
@pytest.mark.parametrize("seed", ["0", "1"])
def test_every_value_stands_where_the_exercise_says(tokenizer, seed):
    made = exercise(tokenizer, POOL * 5, 800, seed)
    ids = made.ids + made.script
    assert len(ids) == 800
    assert len({question.name for question in made.questions}) == VALUES
    assert made.ids[:1] == ((1,) if isinstance(tokenizer, Spelling) else made.ids[:1])
    for question in made.questions:
        asked = len(made.ids) + question.answer.start
        assigned = asked - question.distance
        value = tuple(encode(tokenizer, f" {question.value}"))
        assert ids[asked : asked + len(value)] == ids[assigned : assigned + len(value)] == value
        assert made.script[question.answer] == value
        assert assigned < len(made.ids) / 2 + 150
        before = encode(tokenizer, f"\n{question.name} =")
        assert list(ids[assigned - len(before) : assigned]) == before


def test_the_tokens_are_those_of_the_text_itself():
    made = make()
    text = tiny().tokenizer.decode(made.script)
    assert text == "".join(f"\nassert {question.name} == {question.value}\n" for question in made.questions)
    assert tuple(encode(tiny().tokenizer, text)) == made.script


def test_a_seed_makes_the_same_exercise_and_another_seed_another():
    assert make() == make()
    assert make(seed="1").questions != make().questions


def test_filler_comes_from_the_pool_and_fills_most_of_the_context():
    made = make(length=600)
    filler = [token for token in made.ids if token in POOL]
    assert len(filler) >= 300


def test_too_short_an_exercise_says_how_long_it_must_be():
    with pytest.raises(EvaluationError, match=r"120 tokens are too short for recall: .* use at least \d+") as caught:
        make(length=120)
    needed = int(str(caught.value).split()[-1])
    assert sum(map(len, (make(needed).ids, make(needed).script))) == needed


def test_of_all_exercises_the_one_that_needs_most_says_how_long_they_must_be():
    settings = dataclasses.replace(SETTINGS, length=150, limit=8)
    with pytest.raises(EvaluationError, match="use at least") as caught:
        get_task("recall").samples(tiny(), settings)
    needed = int(str(caught.value).split()[-1])
    assert len(get_task("recall").samples(tiny(), dataclasses.replace(settings, length=needed))) == 8


def test_text_that_does_not_fill_an_exercise_is_an_error(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("a few words only")
    with pytest.raises(TextError, match=r"short\.txt: \d+ tokens of text in all do not fill an exercise of 512"):
        get_task("recall").samples(tiny(), dataclasses.replace(SETTINGS, text=str(text)))


class Parrot:
    """A model that knows what comes next, except at some places."""

    def __init__(self, ids, wrong=()):
        self.ids = ids
        self.wrong = wrong
        self.read = 0

    def forward(self, input_ids, past_key_values, use_cache):
        raise NotImplementedError

    def modules(self):
        return ()

    def __call__(self, input_ids, past_key_values, **options):
        start, self.read = self.read, self.read + input_ids.shape[1]
        assert input_ids[0].tolist() == list(self.ids[start : self.read])
        logits = torch.zeros(1, input_ids.shape[1], 4096)
        for row, place in enumerate(range(start + 1, self.read + 1)):
            token = self.ids[place] if place not in self.wrong else self.ids[place] + 1
            logits[0, row, token] = 1.0
        return SimpleNamespace(logits=logits)


class Anything(Subject):
    def cache(self, loaded, reserve):
        return DynamicCache()


@pytest.mark.parametrize("step", [1, 7, 32, 1000])
def test_a_value_counts_if_every_one_of_its_tokens_does(step):
    made = make()
    ids = made.ids + made.script
    third = made.questions[2].answer
    settings = dataclasses.replace(SETTINGS, step=step)
    task = get_task("recall")

    perfect = task.measure(stand_in(model=Parrot(ids)), Anything(), made, settings)
    assert perfect["recalled"] == perfect["values"] == VALUES

    for place in range(third.start, third.stop):
        parrot = Parrot(ids, wrong=(len(made.ids) + place,))
        record = task.measure(stand_in(model=parrot), Anything(), made, settings)
        assert [answer["recalled"] for answer in record["answers"]] == [n != 2 for n in range(VALUES)]

    beside = Parrot(ids, wrong=(len(made.ids) + third.start - 1, len(made.ids) + third.stop))
    assert task.measure(stand_in(model=beside), Anything(), made, settings)["recalled"] == VALUES


@pytest.mark.slow
def test_the_model_recalls_through_its_own_cache_and_not_through_one_bit():
    subjects = [Subject("full", uniform(16)), Subject("eight", uniform(8)), Subject("one", uniform(1))]
    report = run_task(get_task("recall"), tiny(), subjects, SETTINGS)
    reference, full, eight, one = report.rows
    assert reference.value("recalled") >= 8
    assert reference.value("recall") == reference.value("recalled") / 12
    assert full.metrics == reference.metrics
    assert eight.value("recalled") >= reference.value("recalled") - 1
    assert one.value("recalled") <= reference.value("recalled") / 2
    assert one.quantized_share == eight.quantized_share > 0.9
    assert "12 values in 2 exercises" in report.description


@pytest.mark.slow
def test_recall_does_not_depend_on_the_step_without_quantization():
    task = get_task("recall")
    sample = task.samples(tiny(), SETTINGS)[0]
    records = [task.measure(tiny(), Subject(), sample, dataclasses.replace(SETTINGS, step=step)) for step in (1, 32)]
    assert records[0]["answers"] == records[1]["answers"]


def test_contexts_are_taken_in_turn_each_as_long_as_asked():
    task = get_task("recall", {"contexts": (512, 320)})
    samples = task.samples(tiny(), dataclasses.replace(SETTINGS, limit=5))
    assert [len(sample.ids) + len(sample.script) for sample in samples] == [320, 512, 320, 512, 320]
    assert "30 values in 5 exercises of 320 and 512 tokens" in task.describe(samples, SETTINGS)
    assert task.limit(Settings()) == 20
    assert all(question.depth <= 0.5 for sample in samples for question in sample.questions)


def test_without_options_of_its_own_it_is_the_exercise_of_the_length():
    (given,) = get_task("recall", {"contexts": (512,)}).samples(tiny(), dataclasses.replace(SETTINGS, limit=1))
    assert given == get_task("recall").samples(tiny(), SETTINGS)[0]


def test_values_stand_at_the_depths_that_are_asked_for_equally_often():
    samples = get_task("recall", {"depths": 3}).samples(tiny(), SETTINGS)
    depths = [question.depth for sample in samples for question in sample.questions]
    assert sorted(depths) == [0.0] * 4 + [0.5] * 4 + [1.0] * 4
    for sample in samples:
        assert len(sample.ids) + len(sample.script) == 512
        for question in sample.questions:
            start = len(sample.ids) + question.answer.start - question.distance
            length = question.answer.stop - question.answer.start
            assert sample.ids[start : start + length] == sample.script[question.answer]
            assert abs(start / len(sample.ids) - question.depth) < 0.25


def test_a_record_says_how_long_the_exercise_was_and_where_each_value_stood():
    task = get_task("recall", {"contexts": (320,)})
    sample = task.samples(tiny(), SETTINGS)[0]
    record = task.measure(tiny(), Subject(), sample, SETTINGS)
    assert record["context"] == 320
    keys = {"name", "value", "depth", "distance", "recalled"}
    assert [set(answer) for answer in record["answers"]] == [keys] * VALUES
    assert [answer["depth"] for answer in record["answers"]] == [question.depth for question in sample.questions]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"contexts": (5000, 8192)}, "--contexts 5000 is more than the model's limit of 4096 tokens"),
        ({"contexts": (0, 512)}, "--contexts and --depths must be at least 1"),
        ({"depths": 0}, "--contexts and --depths must be at least 1"),
        ({"contexts": (40, 512)}, "40 tokens are too short for recall"),
    ],
)
def test_lengths_and_depths_that_cannot_be_are_errors(options, said):
    with pytest.raises(EvaluationError, match=said):
        get_task("recall", options).samples(tiny(), SETTINGS)


def test_lengths_beyond_the_models_limit_are_left_out_and_said():
    task, settings = get_task("recall", {"contexts": (320, 512, 8192)}), Settings(limit=3)
    task.check_context(settings, tiny().max_length)
    samples = task.samples(tiny(), settings)
    assert sorted(len(each.ids) + len(each.script) for each in samples) == [320, 320, 512]
    assert "in 3 exercises of 320 and 512 tokens" in task.describe(samples, settings)
    assert task.notices(samples, settings) == ("recall: left out 8192 tokens: they are beyond the model's limit",)
    whole = get_task("recall", {"contexts": (320, 512, 8192)}).samples(tiny(), Settings())
    assert len(whole) == 2 * task.default_limit, "as many of each length as there would be without the other"


def test_fewer_exercises_than_lengths_are_said():
    task, settings = get_task("recall", {"contexts": (320, 512)}), Settings(limit=1)
    assert task.notices(task.samples(tiny(), settings), settings) == (
        "recall: left out 512 tokens: --limit 1 is fewer than the lengths",
    )


def scores(*recalled, values=1):
    return share([{"recalled": each, "values": values} for each in recalled], seed=0)


def test_success_without_exception_is_not_taken_for_certainty():
    for count in (1, 10, 30):
        estimate = scores(*[1] * count)
        assert estimate.value == estimate.high == 1
        # Of Wilson's interval at 0 or n of n the inner bound has a closed form.
        assert estimate.low == pytest.approx(count / (count + 1.959964**2), abs=1e-6)
        none = scores(*[0] * count)
        assert (none.low, none.value) == (0, 0)
        assert none.high == pytest.approx(1 - estimate.low)


def test_with_any_failure_the_interval_is_the_bootstrap_over_exercises():
    estimate = scores(6, 6, 0, 6, values=6)
    assert estimate.value == 0.75
    assert estimate.low < 0.5, "four exercises are four draws, not twenty-four"
    assert estimate.high == 1
