import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone

import pytest
import yaml
from commandline import kvmix_json
from evaluating import INFO, Counting, stand_in, uniform

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError, OutputError, QuantizationError
from kvmix_cli.evaluation import runner
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.runs import Run, Runs, safe_name

TWO = Subject("two", uniform(2, info=INFO))
EIGHT = Subject("eight", uniform(8, info=INFO))
FEW = Settings(limit=2)


def run(folder, task=None, *, resume=False, subjects=(TWO, EIGHT), settings=None, **changes):
    runs = Runs(folder, "builtin--tiny", resume, "kvmix eval --some")
    return run_task(task or Counting(), stand_in(**changes), subjects, settings or Settings(), runs)


def stop_at(name, sample, after=0.0):
    """Ctrl-C before this sample; those before it take `after` seconds each."""

    def stop(subject, each):
        if (subject.name, each.name) == (name, sample):
            raise KeyboardInterrupt
        time.sleep(after)

    return stop


def interrupted_at(name, sample):
    """A task that Ctrl-C ends before this sample."""
    return Counting(before=stop_at(name, sample))


def records(folder, name):
    lines = (folder / f"counting__builtin--tiny__{name}" / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_leaves_its_config_its_samples_and_its_row(tmp_path):
    report = run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "counting__builtin--tiny__eight",
        "counting__builtin--tiny__two",
        "counting__builtin--tiny__unquantized",
    ]
    folder = tmp_path / "counting__builtin--tiny__two"
    assert (folder / "config.yaml").read_text().startswith("# kvmix eval --some\n")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["settings"]["length"] == 1024
    assert config["plan"]["short"] == "0-7:k2v2"
    assert config["model"]["id"] == "builtin:tiny"
    row = json.loads((folder / "metrics.json").read_text())
    assert row.items() >= report.plans[0].as_json().items()
    assert row["metric_info"]["number"] == {
        "name": "number",
        "higher_is_better": False,
        "unit": "",
        "plans_only": False,
    }
    assert (row["tokens"], row["description"]) == (4, "4 numbers")
    assert datetime.now(timezone.utc) - datetime.fromisoformat(row["finished"]) < timedelta(minutes=1)
    assert row["machine"].keys() == {"device", "threads", "torch", "transformers"}
    assert [record["number"] for record in records(tmp_path, "two")] == [2, 3, 4, 5]


def test_the_seconds_of_all_attempts_are_added_up(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counting(before=stop_at("two", "2", after=0.05)))
    assert sum(record["seconds"] for record in records(tmp_path, "two")) >= 0.1
    assert run(tmp_path, resume=True).plans[0].seconds >= 0.1


def test_a_row_that_failed_is_kept_with_its_error_until_it_is_measured(tmp_path):
    metrics = tmp_path / "counting__builtin--tiny__two" / "metrics.json"

    def broken(subject, sample):
        if (subject.name, sample.name) == ("two", "2"):
            raise QuantizationError("layer 3 keys: NaN")

    run(tmp_path, Counting(before=broken))
    assert json.loads(metrics.read_text())["error"] == "layer 3 keys: NaN"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted_at("two", "3"), resume=True)
    assert not metrics.exists(), "of three samples nothing can be said yet"
    assert run(tmp_path, resume=True) == run(tmp_path / "other")
    assert "error" not in json.loads(metrics.read_text())


@pytest.mark.parametrize(("name", "sample"), [("unquantized", "0"), ("unquantized", "2"), ("two", "3"), ("eight", "0")])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, name, sample):
    whole = run(tmp_path / "whole")
    first = interrupted_at(name, sample)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", first)
    second = Counting()
    assert run(tmp_path / "cut", second, resume=True) == whole
    assert len(first.measured) + len(second.measured) == 12
    assert not set(first.measured) & set(second.measured)


def test_without_resume_everything_is_measured_again(tmp_path):
    run(tmp_path)
    again = Counting()
    run(tmp_path, again)
    assert len(again.measured) == 12
    assert len(records(tmp_path, "two")) == 4


def test_a_finished_run_is_only_read_and_a_new_plan_only_added(tmp_path):
    before = run(tmp_path, subjects=(TWO,))
    task = Counting()
    after = run(tmp_path, task, resume=True, subjects=(TWO, EIGHT))
    assert {name for name, _ in task.measured} == {"eight"}
    assert after.rows[:2] == before.rows


def test_a_line_that_a_kill_cut_short_is_measured_again(tmp_path):
    whole = run(tmp_path)
    path = tmp_path / "counting__builtin--tiny__two" / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    task = Counting()
    assert run(tmp_path, task, resume=True) == whole
    assert task.measured == [("two", "3")]
    assert [record["number"] for record in records(tmp_path, "two")] == [2, 3, 4, 5]


def test_a_row_that_is_only_read_again_keeps_its_date_and_its_machine(tmp_path):
    run(tmp_path)
    folder = tmp_path / "counting__builtin--tiny__two"
    row = json.loads((folder / "metrics.json").read_text())
    old = {"finished": "2020-02-02T00:00:00+00:00", "machine": {"device": "an older one"}}
    (folder / "metrics.json").write_text(json.dumps({**row, **old}))
    run(tmp_path, resume=True)
    assert json.loads((folder / "metrics.json").read_text()) == {**row, **old}
    (folder / "samples.jsonl").write_bytes((folder / "samples.jsonl").read_bytes()[:-9])
    run(tmp_path, resume=True)
    again = json.loads((folder / "metrics.json").read_text())
    assert (again["machine"], again["finished"] > row["finished"][:10]) == (row["machine"], True)


def test_what_two_runs_left_in_one_folder_is_an_error_and_not_a_number(tmp_path):
    run(tmp_path)
    path = tmp_path / "counting__builtin--tiny__two" / "samples.jsonl"
    path.write_bytes(2 * path.read_bytes())
    (row,) = (row for row in run(tmp_path, resume=True).rows if row.plan == "two")
    assert "8 records of 4 samples: did two runs share it? Leave out --resume" in row.error
    assert not row.metrics


@pytest.mark.parametrize(
    "damage",
    [b'{"tokens": 1\n', b"\xff\xfe\n", b"\n", b"1\n", b'{"tokens": 1}\n', b'{"tokens": NaN}\n', b"[" * 9999 + b"\n"],
)
def test_damage_inside_the_samples_is_an_error_and_not_a_number(tmp_path, damage):
    run(tmp_path)
    path = tmp_path / "counting__builtin--tiny__two" / "samples.jsonl"
    path.write_bytes(damage + path.read_bytes())
    with pytest.raises(EvaluationError, match=r"samples\.jsonl is damaged: .*--resume"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"settings": Settings(length=512, seed=1)}, "settings.length, settings.seed"),
        ({"settings": Settings(limit=3)}, "settings.limit, samples.count, samples.sha256"),
        ({"info": INFO.model_copy(update={"config_sha256": "00"})}, "model.config_sha256"),
        ({"subjects": (Subject("two", uniform(4, info=INFO)),)}, "plan.short, plan.sha256"),
    ],
)
def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path, changed, named):
    run(tmp_path)
    before = records(tmp_path, "two")
    with pytest.raises(EvaluationError, match=f"was measured with another {named}; leave out --resume"):
        run(tmp_path, resume=True, **changed)
    assert records(tmp_path, "two") == before


def test_a_task_without_options_says_nothing_of_them_so_that_older_runs_are_gone_on_with(tmp_path):
    run(tmp_path)
    config = (tmp_path / "counting__builtin--tiny__two" / "config.yaml").read_text()
    assert "options" not in config
    assert "machine" not in config


def test_times_are_not_gone_on_with_on_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(Counting, "timed", True)
    run(tmp_path)
    run(tmp_path, resume=True)
    monkeypatch.setattr(runner, "machine", lambda device: {"device": "another"})
    with pytest.raises(EvaluationError, match=r"measured with another machine\.device"):
        run(tmp_path, resume=True)


def test_a_command_with_control_characters_makes_a_config_that_can_be_read(tmp_path):
    Runs(tmp_path, "tiny", command="kvmix eval --plan '\x07\x1b[31m'").open("task", "plan", {"a": 1}).close()
    Runs(tmp_path, "tiny", resume=True).open("task", "plan", {"a": 1}).close()


def test_a_folder_that_another_process_measures_into_is_refused_and_left_alone(tmp_path):
    with Runs(tmp_path, "builtin--tiny").open("counting", "two", {"a": 1}):
        with held_elsewhere(tmp_path / "counting__builtin--tiny__eight"):
            with pytest.raises(EvaluationError, match=r"another process is measuring into .*eight; wait for it, or"):
                Runs(tmp_path, "builtin--tiny").open("counting", "eight", {"a": 1})
            assert [path.name for path in (tmp_path / "counting__builtin--tiny__eight").iterdir()] == [".lock"]
        Runs(tmp_path, "builtin--tiny").open("counting", "eight", {"a": 1}).close()


def test_of_two_processes_on_one_output_folder_one_measures_and_the_other_says_why_not(tmp_path):
    with held_elsewhere(tmp_path / "counting__builtin--tiny__two"):
        with pytest.raises(EvaluationError, match="another process is measuring into"):
            run(tmp_path)
        assert not (tmp_path / "counting__builtin--tiny__two" / "samples.jsonl").exists()
    assert run(tmp_path, resume=True) == run(tmp_path / "other"), "a killed process keeps nobody out"


@contextmanager
def held_elsewhere(folder):
    """Another process has the folder's run open, until it is killed with SIGKILL."""
    script = f"from pathlib import Path; from kvmix_cli.evaluation.runs import Run; run = Run(Path({str(folder)!r})); "
    script += "run.lock(); print('locked', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout.readline() == b"locked\n"
        yield
    finally:
        process.kill()
        process.communicate()


def test_resuming_nothing_starts(tmp_path):
    task = Counting()
    run(tmp_path, task, resume=True)
    assert len(task.measured) == 12


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    task = Counting()
    with pytest.raises(OutputError, match="cannot write"):
        run(tmp_path / "file" / "results", task)
    assert task.measured == []


def test_a_full_disk_keeps_the_samples_that_are_there(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted_at("two", "2"))
    full = (tmp_path / "counting__builtin--tiny__two" / "samples.jsonl").stat().st_ino

    def fsync(descriptor):
        if os.fstat(descriptor).st_ino == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match=r"two/samples\.jsonl: No space left on device; --resume goes on"):
            run(tmp_path, resume=True)
    assert run(tmp_path, resume=True) == run(tmp_path / "other")


def test_names_of_plans_make_folders_that_differ(tmp_path):
    names = ["two", "0-3:k4v4,4-7:k2v2", "0-3-k4v4-4-7-k2v2", "../up", "a/b", "a b", "x" * 300, "x" * 301]
    safe = [safe_name(name) for name in names]
    assert len(set(safe)) == len(names)
    assert all("/" not in name and len(name) < 100 for name in safe)
    assert safe[0] == "two"
    Run(tmp_path / safe[3]).start({"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == [safe[3]]


@pytest.mark.parametrize("timed", [False, True])
def test_a_kill_before_any_access_to_a_file_loses_at_most_the_sample_in_hand(tmp_path, monkeypatch, timed):
    """A process is killed with SIGKILL before its first, second, third, ... access, until one gets to its end.

    Rows take turns where times are taken.
    """
    monkeypatch.setattr(Counting, "timed", timed)
    whole = run(tmp_path / "whole", settings=FEW)
    for accesses in range(1, 1000):
        folder = tmp_path / str(accesses)
        killed, first = measured_until(folder, accesses)
        second = Counting()
        assert run(folder, second, resume=True, settings=FEW) == whole
        again = set(first) & set(second.measured)
        assert len(again) <= 1, "more than the sample in hand was measured twice"
        assert len(first) + len(second.measured) == 6 + len(again)
        if not killed:
            break
    assert accesses > 30
    assert second.measured == []


def test_a_kill_while_starting_over_never_mixes_two_runs(tmp_path):
    """The folder holds an older run of another plan of the same name; resuming then gives this run's row or none."""
    whole = run(tmp_path / "whole", settings=FEW)
    outcomes = []
    for accesses in range(1, 1000):
        folder = tmp_path / str(accesses)
        run(folder, subjects=(Subject("two", uniform(4, info=INFO)),), settings=FEW)
        killed, _ = measured_until(folder, accesses)
        try:
            assert run(folder, resume=True, settings=FEW) == whole
            outcomes.append("resumed")
        except EvaluationError as error:
            assert "two was measured with another plan.short, plan.sha256; leave out --resume" in str(error)
            outcomes.append("refused")
        if not killed:
            break
    assert outcomes == sorted(outcomes), "refused while the older run is there, resumed as soon as this one is"
    assert {*outcomes} == {"refused", "resumed"}


def measured_until(folder, accesses):
    """Whether a process that is killed after so many accesses to files in a folder was, and what it had measured."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _run_to_the_kill(folder, accesses, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        measured = [tuple(line.split()) for line in pipe]
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0, measured


def _run_to_the_kill(folder, accesses, writing):
    """What the process does; it never returns."""
    left = accesses

    def count(event, arguments):
        nonlocal left
        if event in ("open", "os.mkdir", "os.remove", "os.rename") and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    task = Counting()
    measure = task.measure

    def tell(loaded, subject, sample, settings):
        os.write(writing, f"{subject.name} {sample.name}\n".encode())
        return measure(loaded, subject, sample, settings)

    task.measure = tell
    try:
        run(folder, task, settings=FEW)
        os._exit(0)
    finally:
        os._exit(1)


def test_a_killed_evaluation_resumes_to_the_same_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["eval", "--model", "builtin:tiny", "--uniform", "2", "--device", "cpu"]
    arguments += ["--length", "332", "--prefix", "300", "--step", "4", "--limit", "4"]
    command = [sys.executable, "-c", "from kvmix_cli.main import main; main()", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    samples = tmp_path / "results" / "perplexity__builtin--tiny__uniform-2" / "samples.jsonl"
    deadline = time.monotonic() + 120
    while not (samples.exists() and samples.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = samples.read_text()
    assert 1 <= left.count("\n") < 4

    resumed, afresh = (kvmix_json(*arguments, *more) for more in (["--resume"], ["--output-dir", "afresh"]))
    assert samples.read_text().startswith(left[: left.rfind("\n") + 1])
    for one, other in zip(resumed["rows"], afresh["rows"], strict=True):
        assert one["quantized_share"] == other["quantized_share"]
        for name, estimate in one["metrics"].items():
            assert estimate == pytest.approx(other["metrics"][name], rel=1e-5, abs=1e-6)
