"""Points of a sweep, their repeats and order; and the search for the largest batch. No test asserts a speed."""

import json
from dataclasses import replace

import pytest
import torch
from evaluating import run_folder, stand_in, tiny, uniform
from hypothesis import given
from hypothesis import strategies as st

from kvmix_cli.cache.baselines.named import named_cache
from kvmix_cli.cache.subject import Subject
from kvmix_cli.decoding.timing import Timing
from kvmix_cli.errors import EvaluationError, TextError
from kvmix_cli.evaluation import get_task
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.results import Estimate
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.runs import RunFolders
from kvmix_cli.evaluation.tasks.throughput import search, task, text
from kvmix_cli.evaluation.tasks.throughput.search import Search, largest, time_largest
from kvmix_cli.evaluation.tasks.throughput.summary import outcomes
from kvmix_cli.models import memory as peak

SETTINGS = Settings(length=64)
TWO = Subject("two", uniform(2))
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


def throughput(**options):
    return get_task("throughput", {"batches": (1, 2), "new_tokens": 4, "repeats": 2, **options})


def made_up(batch, seconds=1.0, cache=10, peak=20):
    return Timing(seconds / 2, seconds, cache, peak, "sdpa", {"total": 10.0 * batch, "quantized": 5.0 * batch})


@pytest.fixture
def fake(monkeypatch):
    """Generations that take no time: `fake.takes(subject, batch)` seconds, or out of memory if that is None."""

    class Fake:
        def __init__(self):
            self.ran = []
            self.takes = lambda subject, batch: 1.0

        def time_generation(self, loaded, subject, ids, new_tokens):
            self.ran.append((subject.name, *ids.shape, new_tokens))
            seconds = self.takes(subject, len(ids))
            if seconds is None:
                raise OUT_OF_MEMORY
            return made_up(len(ids), seconds)

    made = Fake()
    monkeypatch.setattr(task, "time_generation", made.time_generation)
    monkeypatch.setattr(task, "tidy", lambda on: None)
    monkeypatch.setattr(peak, "tidy", lambda on: None)
    return made


# The search


@given(
    fitting=st.integers(0, 3000),
    guess=st.integers(0, 5000),
    most=st.integers(1, 4096),
)
def test_the_search_finds_exactly_the_largest_that_fits(fitting, guess, most):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= fitting

    assert largest(fits, guess, most) == min(fitting, most)
    assert all(1 <= batch <= most for batch in tried)
    assert len(tried) == len(set(tried)) <= 2 + 2 * max(most, 2).bit_length()


@given(fitting=st.integers(1, 3000), guess=st.integers(1, 3000))
def test_the_search_goes_little_beyond_what_fits_if_its_guess_does(fitting, guess):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= fitting

    largest(fits, min(guess, fitting))
    assert max(tried) <= 2 * fitting


def test_without_a_guess_the_search_doubles_and_then_halves():
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= 21

    assert largest(fits) == 21
    assert tried == [1, 2, 4, 8, 16, 32, 24, 20, 22, 21]


@given(each=st.integers(1, 50), fixed=st.integers(0, 200), memory=st.integers(1, 5000))
def test_a_search_within_memory_finds_the_last_batch_within_it_and_tries_none_twice(each, fixed, memory):
    tried = []

    def trial(batch):
        tried.append(batch)
        return made_up(batch, peak=fixed + each * batch)

    found = Search(trial, memory).run(room=memory)
    assert found == min(max(0, (memory - fixed) // each) if max(10, fixed + each) <= memory else 0, search.MOST)
    assert len(tried) == len(set(tried))
    assert max(fixed + each * batch for batch in tried) <= max(2 * memory, fixed + each)


def test_where_a_peak_cannot_be_measured_the_cache_itself_must_fit():
    found = Search(lambda batch: made_up(batch, cache=7 * batch, peak=None), memory=100).run(room=100)
    assert found == 14


def test_a_search_without_a_limit_goes_on_until_memory_runs_out():
    assert Search(lambda batch: made_up(batch) if batch <= 37 else None, None).run(room=None) == 37
    assert Search(lambda batch: None, None).run(room=None) == 0


def test_a_batch_whose_later_steps_do_not_fit_is_made_smaller_until_all_repeats_do():
    tried = []

    def measure(batch):
        tried.append(batch)
        return made_up(batch) if batch <= 60 else None

    batch, timings = time_largest(measure, 64, repeats=3)
    assert (batch, len(timings)) == (60, 3)
    assert tried == [64, 62, 61, 60, 60, 60]
    assert time_largest(lambda batch: None, 3, repeats=1) == (0, [])


# The prompts


def test_rows_are_different_text_of_the_length_asked_for():
    stretch = text.stretch(tiny(), SETTINGS, 64)
    rows = text.rows(tiny(), stretch, 64, batch=50)
    assert rows.shape == (50, 64)
    assert len({tuple(row) for row in rows.tolist()}) == 50
    assert torch.equal(rows, text.rows(tiny(), stretch, 64, batch=50))
    assert text.rows(tiny(), stretch, 16, batch=1).shape == (1, 16)


def test_text_that_is_too_short_for_one_prompt_is_an_error(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("only this")
    with pytest.raises(TextError, match="are no prompt of 64; give more with --text"):
        throughput().samples(tiny(), replace(SETTINGS, text=str(path)))


def test_text_for_one_prompt_alone_is_repeated_in_the_rows(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("word " * 80)
    stretch = text.stretch(tiny(), replace(SETTINGS, text=str(path)), 64)
    assert text.rows(tiny(), stretch, 64, batch=500).shape == (500, 64)


# The sweep


def places(samples):
    return [(point.context, point.batch, point.repeat) for point in samples]


def test_points_are_contexts_by_batches_by_repeats_and_the_largest_batch_if_memory_is_given():
    samples = throughput(contexts=(32, 64), memory=2**20).samples(tiny(), SETTINGS)
    sweep = [(context, batch, repeat) for context in (32, 64) for batch in (1, 2) for repeat in (0, 1)]
    assert places(samples) == [*sweep, (32, None, 0), (64, None, 0)]
    assert places(throughput().samples(tiny(), SETTINGS)) == [
        (64, batch, repeat) for batch in (1, 2) for repeat in (0, 1)
    ]
    assert len(throughput().samples(tiny(), replace(SETTINGS, limit=3))) == 3


def test_rows_take_turns_and_each_point_is_warmed_up_once(fake):
    run_task(throughput(batches=(2,)), tiny(), [TWO], SETTINGS)
    warm, timed = (2, 64, 3), (2, 64, 4)
    first = [("unquantized", *warm), ("unquantized", *timed), ("two", *warm), ("two", *timed)]
    assert fake.ran == [*first, ("unquantized", *timed), ("two", *timed)]


def test_metrics_are_medians_of_the_largest_point_with_their_extremes(fake):
    seconds = {"unquantized": iter([9, 9, 9, 9, 9, 8.0, 4.0, 6.0]), "two": iter([9, 9, 9, 9, 9, 1.0, 3.0, 2.0])}
    fake.takes = lambda subject, batch: next(seconds[subject.name])
    report = run_task(throughput(repeats=3), tiny(), [TWO], SETTINGS)
    reference, two = report.rows
    assert reference.metrics["decode_tokens_per_s"] == Estimate(2 * 3 / 6, 2 * 3 / 8, 2 * 3 / 4)
    assert two.metrics["prompt_tokens_per_s"] == Estimate(2 * 64 / 1, 2 * 64 / 1.5, 2 * 64 / 0.5)
    assert two.metrics["decode_speedup"] == Estimate(3, 4 / 3, 8)
    assert "decode_speedup" not in reference.metrics
    assert two.value("cache_bytes") == 10
    assert two.quantized_share == 0.5
    assert report.tokens == 3 * 3 * (1 + 2)


def test_a_point_without_memory_does_not_take_the_others_with_it(fake):
    fake.takes = lambda subject, batch: None if batch == 2 and subject.plan is None else 1.0
    report = run_task(throughput(batches=(1, 2, 4)), tiny(), [TWO], SETTINGS)
    found = outcomes(report.reference.records)
    assert [place.batch for place, outcome in found.items() if outcome.decode] == [1, 4]
    assert fake.ran.count(("unquantized", 2, 64, 4)) == 0, "what did not fit when warming up is not tried again"
    assert report.plans[0].value("decode_speedup") == 1


def test_a_metric_never_stands_for_a_smaller_point(fake):
    fake.takes = lambda subject, batch: None if batch == 2 and subject.plan is None else 1.0
    report = run_task(throughput(), tiny(), [TWO], SETTINGS)
    assert report.reference.metrics == {}
    assert report.reference.error is None
    assert "unquantized: out of memory at the largest context and batch" in report.reference.warnings[0]
    assert report.plans[0].value("decode_tokens_per_s") == 6
    assert "decode_speedup" not in report.plans[0].metrics


def test_a_row_without_memory_anywhere_says_so(fake):
    fake.takes = lambda subject, batch: None if subject.plan else 1.0
    report = run_task(throughput(), tiny(), [TWO], SETTINGS)
    assert report.plans[0].error.startswith("out of memory at every context and batch")
    assert report.reference.error is None


def test_repeats_that_differ_much_are_mentioned(fake):
    seconds = iter([1, 1, 1.0, 2.0])
    fake.takes = lambda subject, batch: next(seconds)
    report = run_task(throughput(batches=(1,), repeats=3), tiny(), [], SETTINGS)
    assert "unquantized: its repeats differ by 50%" in report.reference.warnings[0]


def test_records_survive_an_end_in_the_middle_and_are_gone_on_with(fake, tmp_path):
    calls = []

    def stop(subject, batch):
        calls.append((subject.name, batch))
        if calls.count(("two", 2)) == 2:  # a warm-up and the first repeat
            raise KeyboardInterrupt
        return None if batch == 1 and subject.plan is None else 1.0

    fake.takes = stop
    sweep, runs = throughput(), RunFolders(tmp_path, "tiny")
    with pytest.raises(KeyboardInterrupt):
        run_task(sweep, tiny(), [TWO], SETTINGS, runs)
    lines = {name: _lines(tmp_path, name) for name in ("unquantized", "two")}
    assert [len(each) for each in lines.values()] == [3, 2]
    assert json.loads(lines["unquantized"][0])["out_of_memory"] is True
    fake.takes = lambda subject, batch: 1.0
    fake.ran.clear()
    report = run_task(sweep, tiny(), [TWO], SETTINGS, replace(runs, resume=True))
    timed = [(name, batch) for name, batch, _, new_tokens in fake.ran if new_tokens == 4]
    assert timed == [("two", 2), ("unquantized", 2), ("two", 2)]
    assert [len(row.records) for row in report.rows] == [4, 4]
    assert report.plans[0].value("decode_speedup") == 1


def _lines(folder, name):
    return (run_folder(folder, name, "throughput", "tiny") / "samples.jsonl").read_text().splitlines()


def test_the_largest_batch_is_looked_for_and_timed(fake):
    fake.takes = lambda subject, batch: None if batch > (5 if subject.plan is None else 20) else float(batch)
    report = run_task(throughput(batches=(1,), memory=2**20), tiny(), [TWO], SETTINGS)
    reference, two = report.rows
    assert (reference.value("largest_batch"), two.value("largest_batch")) == (5, 20)
    assert two.value("largest_batch_decode_tokens_per_s") == 20 * 3 / 20
    assert two.value("largest_batch_speedup") == 1
    record = two.records[-1]
    assert (record["batch"], record["tokens"], record["largest"]) == (20, 2 * 20 * 3, True)
    assert record["tried"]["21"] is None
    assert record["tried"]["20"] == 20


def test_not_even_one_sequence_is_a_largest_batch_of_none(fake):
    fake.takes = lambda subject, batch: 1.0
    report = run_task(throughput(batches=(1,), memory=1), tiny(), [TWO], SETTINGS)
    assert [row.value("largest_batch") for row in report.rows] == [0, 0]
    assert "largest_batch_speedup" not in report.plans[0].metrics


def test_the_table_has_every_point_of_every_row(fake):
    fake.takes = lambda subject, batch: None if batch > (1 if subject.plan is None else 6) else 1.0
    sweep = throughput(memory=2**20)
    report = run_task(sweep, tiny(), [TWO], SETTINGS)
    (table,) = sweep.details(report.rows)
    rows = [(row[1], row[2], row[5]) for row in table.rows]
    assert rows == [
        ("1", "unquantized", "3.00"),
        ("1", "two", "3.00"),
        ("2", "unquantized", "out of memory"),
        ("2", "two", "6.00"),
        ("1 (largest)", "unquantized", "3.00"),
        ("6 (largest)", "two", "18.0"),
    ]
    assert [row[6] for row in table.rows] == ["-", "1.00x", "-", "-", "-", "6.00x"]
    assert all(len(row) == len(table.columns) for row in table.rows)


@pytest.mark.slow
def test_a_small_sweep_runs_on_the_built_in_model():
    sweep = throughput(contexts=(32,), memory=2 * 2**20)
    subjects = [TWO, Subject("fp8", baseline=named_cache("fp8", tiny().config, tiny().model.dtype, tiny().device))]
    report = run_task(sweep, tiny(), subjects, SETTINGS)
    for row in report.rows:
        assert row.error is None
        assert len(row.records) == 2 * 2 + 1
        assert row.value("largest_batch") >= 1
    two = outcomes(report.plans[0].records)
    assert {outcome.attention for outcome in two.values()} == {"kvmix"}
    assert report.plans[0].value("cache_bytes") < report.reference.value("cache_bytes")
    assert 0.9 < report.plans[1].quantized_share <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"new_tokens": 1}, "--new-tokens must be at least 2, got 1"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
        ({"contexts": (0, 8)}, "--contexts and --batches must be at least 1"),
        ({"batches": (0,)}, "--contexts and --batches must be at least 1"),
        ({"batches": ()}, "--contexts and --batches must be at least 1"),
        ({"contexts": (4095,)}, "4095 tokens and --new-tokens 4 are more than the model's limit of 4096"),
        ({"memory": 2**60}, r"--memory 1048576 TiB: the search tries up to twice as much, and only .* are free"),
    ],
)
def test_what_cannot_be_measured_is_an_error_before_anything_is(options, said):
    with pytest.raises(EvaluationError, match=said):
        throughput(**options).samples(tiny(), SETTINGS)


def test_on_a_gpu_the_largest_batch_is_looked_for_without_being_asked(monkeypatch):
    gpu = stand_in(device=torch.device("cuda"), tokenizer=tiny().tokenizer)
    assert places(throughput().samples(gpu, SETTINGS))[-1] == (64, None, 0)
