import json
import random
import shutil

import forking
import pytest
from evaluating import INFO, run_folder, uniform
from reporting import FOUR, TWO, Scripted, measured, memory, perplexity, recall, throughput

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError
from kvmix_cli.evaluation import work
from kvmix_cli.evaluation.base import Sample, Settings
from kvmix_cli.evaluation.collect import collect
from kvmix_cli.evaluation.readback import read_run
from kvmix_cli.evaluation.results import Estimate
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TensorPlan


class Other:
    """Somebody else's cache."""

    nominal_bits, stored_bits = 4, None

    def __init__(self, **settings):
        self.name, self.settings = "other", settings


def only(items):
    (item,) = items
    return item


def line(group, label):
    return only(line for line in group.lines if line.label == label)


@pytest.fixture
def results(tmp_path):
    """Perplexity of three rows, in `results`."""
    measured(tmp_path / "results", perplexity())
    return tmp_path / "results"


def test_rows_come_back_as_they_were_measured(tmp_path):
    report = measured(tmp_path, recall())
    group = only(collect([tmp_path]).groups)
    measurement = only(group.measurements)
    for before in report.rows:
        assert measurement.row(line(group, before.plan)) == before
    assert measurement.metrics == recall().metrics
    assert measurement.description == report.description
    run = measurement.runs[line(group, "two").key]
    assert (run.command, run.tokens, run.model) == ("kvmix eval --some", 2, INFO)
    assert run.machine.keys() >= {"device", "torch"}
    assert run.finished.tzinfo is not None


def test_the_unquantized_cache_is_first_and_plans_follow_by_stored_bits(tmp_path):
    subjects = [FOUR, TWO, Subject("eight", uniform(8, info=INFO)), Subject("other", baseline=Other(bits=4))]
    measured(tmp_path, perplexity(), subjects)
    lines = only(collect([tmp_path]).groups).lines
    assert [line.label for line in lines] == ["unquantized", "two", "four", "eight", "other"]
    assert [line.is_reference for line in lines] == [True, False, False, False, False]
    assert lines[1].layers == dict.fromkeys(range(8), (2, 2))
    assert (lines[0].layers, lines[4].layers, lines[4].stored_bits) == (None, None, None)


def test_tasks_stand_in_one_group_in_the_order_of_the_registry(tmp_path):
    for task in (
        throughput(),
        memory(),
        recall(),
        perplexity(),
        Scripted("arc_easy", recall().metrics, recall().numbers),
    ):
        measured(tmp_path, task)
    group = only(collect([tmp_path]).groups)
    assert [each.title for each in group.measurements] == ["perplexity", "recall", "memory", "throughput", "arc_easy"]
    assert [each.timed for each in group.measurements] == [False, False, False, True, False]
    assert len(group.lines) == 3


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"dtype": "bfloat16"}, ["bfloat16", "float32"]),
        ({"info": INFO.model_copy(update={"revision": "main"})}, ["revision default", "revision main"]),
        ({"info": INFO.model_copy(update={"id": "org/other"})}, ["", ""]),
    ],
)
def test_models_that_are_not_the_same_are_groups_of_their_own(tmp_path, changed, told):
    measured(tmp_path / "one", perplexity())
    measured(tmp_path / "other", perplexity(), **changed)
    groups = collect([tmp_path / "one", tmp_path / "other"]).groups
    assert sorted(group.told for group in groups) == told
    assert len({group.title for group in groups}) == 2
    assert all(len(group.lines) == 3 for group in groups)


def test_another_version_of_kvmix_is_a_group_of_its_own(tmp_path, monkeypatch):
    measured(tmp_path / "one", perplexity())
    monkeypatch.setattr(work, "__version__", "9.9")
    measured(tmp_path / "other", perplexity())
    titles = [group.title for group in collect([tmp_path / "one", tmp_path / "other"]).groups]
    assert titles == ["builtin:tiny (kvmix 0.1.0)", "builtin:tiny (kvmix 9.9)"]


def test_one_task_asked_for_in_two_ways_is_two_measurements(tmp_path):
    for length in (2048, 512):
        measured(tmp_path / str(length), perplexity(), settings=Settings(length=length))
    measured(tmp_path / "512", recall(), settings=Settings(length=512))
    group = only(collect([tmp_path / "512", tmp_path / "2048"]).groups)
    titles = ["perplexity (length 512)", "perplexity (length 2048)", "recall"]
    assert [each.title for each in group.measurements] == titles
    assert [len(each.runs) for each in group.measurements] == [3, 3, 3]


def test_samples_are_told_apart_where_nothing_else_is(tmp_path):
    for number in (0, 1):
        task = perplexity()
        task.samples = lambda loaded, settings, number=number: [Sample(str(number), (number,)), Sample("2", (2,))]
        measured(tmp_path / str(number), task)
    told = [each.told for each in only(collect([tmp_path / "0", tmp_path / "1"]).groups).measurements]
    assert len(set(told)) == 2
    assert all(each.startswith("samples ") and len(each) == 14 for each in told)


def test_times_of_two_machines_are_not_compared(tmp_path, monkeypatch):
    for name in ("slow", "fast"):
        monkeypatch.setattr(work, "machine", lambda device, name=name: {"device": name, "torch": "2.13"})
        measured(tmp_path / name, throughput())
        measured(tmp_path / name, recall())
    group = only(collect([tmp_path / "slow", tmp_path / "fast"]).groups)
    titles = ["recall", "throughput (fast)", "throughput (slow)"]
    assert [each.title.replace("device ", "") for each in group.measurements] == titles


def test_two_plans_of_one_name_are_two_lines(tmp_path):
    measured(tmp_path / "one", perplexity(), [TWO])
    measured(tmp_path / "other", perplexity(), [Subject("two", uniform(3, info=INFO))])
    lines = only(collect([tmp_path / "one", tmp_path / "other"]).groups).lines
    assert [line.label[:5] for line in lines] == ["unqua", "two (", "two ("]
    assert [line.stored_bits for line in lines] == [16, 4, 5]
    assert len({line.label for line in lines}) == 3


def test_a_baseline_with_other_settings_is_another_line(tmp_path):
    for axis in (0, 1):
        measured(tmp_path / str(axis), perplexity(), [Subject("other", baseline=Other(axis=axis))])
    group = only(collect([tmp_path / "0", tmp_path / "1"]).groups)
    assert len(group.lines) == 3
    assert len(group.measurements) == 1


def test_a_run_that_was_interrupted_is_unfinished(tmp_path):
    def stop(subject, index):
        if (subject.name, index) == ("two", 1):
            raise KeyboardInterrupt
        return {}

    task = perplexity()
    task.record = stop
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, task)
    collection = collect([tmp_path])
    assert [line.label for line in only(collection.groups).lines] == ["unquantized", "four"]
    run = only(collection.unfinished)
    assert (run.task, run.plan, run.model, run.done, run.samples) == ("perplexity", "two", "builtin:tiny", 1, 2)
    assert run.command == "kvmix eval --some"


def test_a_run_that_failed_keeps_its_error_and_has_no_number(tmp_path):
    def fail(subject, index):
        if subject.name == "two":
            raise EvaluationError("no memory is left")
        return {}

    task = perplexity()
    task.record = fail
    measured(tmp_path, task)
    group = only(collect([tmp_path]).groups)
    assert only(group.measurements).row(line(group, "two")).error == "no memory is left"
    assert only(group.measurements).estimate(line(group, "two"), "perplexity") is None


def test_a_folder_given_twice_is_read_once(results):
    collection = collect([results, results / ".", run_folder(results, "two")])
    assert len(only(collection.groups).runs) == 3
    assert collection.notes == ()


def test_a_folder_may_be_that_of_one_run(results):
    assert [line.label for line in only(collect([run_folder(results, "two")]).groups).lines] == ["two"]


def test_copies_of_a_run_are_one_and_of_two_numbers_the_newer_is_shown_and_the_other_noted(results, tmp_path):
    shutil.copytree(results, tmp_path / "copy")
    assert collect([results, tmp_path / "copy"]).notes == ()
    path = run_folder(tmp_path / "copy", "two") / "metrics.json"
    row = json.loads(path.read_text())
    row["metrics"]["perplexity"]["value"] = 11.0
    row["finished"] = "2999-01-01T00:00:00+00:00"
    path.write_text(json.dumps(row))
    collection = collect([results, tmp_path / "copy"])
    group = only(collection.groups)
    assert only(group.measurements).estimate(line(group, "two"), "perplexity") == Estimate(11.0, 8.2, 12.4)
    assert f"{run_folder(results, 'two')} has other numbers of the same work as" in only(collection.notes)


def test_a_run_that_has_a_number_goes_before_one_that_failed(results, tmp_path):
    shutil.copytree(results, tmp_path / "copy")
    path = run_folder(tmp_path / "copy", "two") / "metrics.json"
    row = {**json.loads(path.read_text()), "error": "no memory", "finished": "2999-01-01T00:00:00+00:00"}
    del row["metrics"]
    path.write_text(json.dumps(row))
    collection = collect([results, tmp_path / "copy"])
    group = only(collection.groups)
    assert only(group.measurements).row(line(group, "two")).error is None
    assert collection.notes == ()


def test_a_line_that_is_being_written_is_not_counted_and_not_cut_off(results):
    (run_folder(results, "two") / "metrics.json").unlink()
    samples = run_folder(results, "two") / "samples.jsonl"
    samples.write_bytes(samples.read_bytes()[:-5])
    before = samples.read_bytes()
    assert only(collect([results]).unfinished).done == 1
    assert samples.read_bytes() == before


DAMAGE = {
    "config.yaml": ["", "{", "a: 1\n", "format: kvmix-run/2\n", "format: kvmix-run/1\n", "\x00", None],
    "metrics.json": ["", "{", "[]", "1", "{}", "NaN", "[" * 5000, '{"task": "recall"}'],
    "samples.jsonl": ["", "1\n", "{}\n", '{"tokens": 1}\n', "\x00\n", None],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGE.items() for text in texts])
def test_a_damaged_run_is_named_with_its_file_and_the_others_are_there(results, name, text):
    path = run_folder(results, "two") / name
    path.unlink()
    if text is not None:
        path.write_text(text)
    collection = collect([results])
    assert [line.label for line in only(collection.groups).lines] == ["unquantized", "four"]
    assert str(run_folder(results, "two")) in only(collection.faults)
    assert collection.unfinished == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "recall"}, "has the row of task recall, but config.yaml that of perplexity"),
        ({"metric_info": {}}, ""),
        ({"quantized_share": "much"}, "quantized_share"),
        ({"metrics": {"perplexity": {"value": 1}}}, "low"),
        ({"metric_info": None}, "metric_info"),
    ],
)
def test_a_row_that_does_not_hold_together_is_a_fault_or_has_no_number(results, change, said):
    path = run_folder(results, "two") / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    collection = collect([results])
    if said:
        assert said in only(collection.faults)
    else:
        group = only(collection.groups)
        assert only(group.measurements).estimate(line(group, "two"), "perplexity") is None


@pytest.mark.slow
def test_no_damage_at_all_gives_a_traceback(results):
    rng = random.Random(0)
    original = {path: path.read_bytes() for path in run_folder(results, "two").iterdir()}
    for _ in range(150):
        path = rng.choice(sorted(original))
        data = bytearray(original[path])
        at = rng.randrange(len(data))
        if rng.random() < 0.5:
            data[at] = rng.randrange(256)
        else:
            del data[at : at + rng.randrange(1, 200)]
        path.write_bytes(data)
        groups = collect([results]).groups
        assert {"unquantized", "four"} <= {line.label for group in groups for line in group.lines}
        path.write_bytes(original[path])


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (["nowhere"], "nowhere does not exist; `kvmix eval` leaves runs in --output-dir"),
        (["empty"], "no runs in empty; `kvmix eval` leaves some"),
        (["empty", "file"], "no runs in empty, file;"),
        (["results", "nowhere"], "nowhere does not exist"),
    ],
)
def test_places_without_runs_are_errors(results, tmp_path, monkeypatch, places, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match=said.replace("`", ".")):
        collect([tmp_path.__class__(place) for place in places])


def test_if_every_run_is_damaged_the_first_is_the_error(results):
    for path in results.glob("*/config.yaml"):
        path.write_text("{")
    with pytest.raises(EvaluationError, match=r"four__[0-9a-f]{8}/config\.yaml: line"):
        collect([results])


def test_other_files_beside_the_runs_do_no_harm(results):
    (results / "report.html").write_text("")
    (results / "empty").mkdir()
    assert len(only(collect([results, results / "report.html"]).groups).lines) == 3


def test_plans_of_unusual_models_come_back(tmp_path):
    """Layers that keep a cache of their own, heads that no group size divides, groups of one tensor's own."""
    info = INFO.model_copy(update={"stock": {1: "sliding_attention"}, "head_dim": 80, "layers": 3})
    tensor = TensorPlan(bits=4, group_size="row")
    layers = {0: LayerPlan(k=tensor, v=TensorPlan(bits=16)), 2: LayerPlan(k=tensor, v=tensor)}
    plan = Plan.build(info, layers, CacheSettings(group_size=16))
    measured(tmp_path, perplexity(), [Subject("odd", plan)], info=info)
    collection = collect([tmp_path])
    assert collection.faults == ()
    assert only(collection.groups).model == info
    assert line(only(collection.groups), "odd").layers == {0: (4, 16), 2: (4, 4)}


@pytest.mark.slow
def test_reading_needs_no_torch():
    script = "import sys, kvmix_cli.evaluation.collect; sys.exit('torch' in sys.modules)"
    assert forking.run(code=script, imports=forking.LIGHT).returncode == 0


def test_one_run_can_be_read_alone(results):
    assert read_run(run_folder(results, "two")).row.plan == "two"
