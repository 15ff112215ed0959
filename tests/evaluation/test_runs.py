import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from itertools import count
from pathlib import Path

import forking
import pytest
import yaml
from commandline import kvmix_json
from evaluating import INFO, Counting, run_folder, stand_in, uniform

from kvmix_cli import journal
from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import DocumentError, EvaluationError, OutputError, QuantizationError, StateError
from kvmix_cli.evaluation import work
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.identity import safe_name
from kvmix_cli.evaluation.readback import read_run
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.runs import RunFolders
from kvmix_cli.files import write_text

TWO = Subject("two", uniform(2, info=INFO))
EIGHT = Subject("eight", uniform(8, info=INFO))
FEW = Settings(limit=2)


def run(folder, task=None, *, resume=False, subjects=(TWO, EIGHT), settings=None, **changes):
    folders = RunFolders(folder, "builtin--tiny", resume, "kvmix eval --some")
    return run_task(task or Counting(), stand_in(**changes), subjects, settings or Settings(), folders)


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


def place(root, name):
    return run_folder(root, name, "counting")


def records(root, name):
    return [json.loads(line) for line in (place(root, name) / "samples.jsonl").read_text().splitlines()]


def finished(folder):
    return (folder / "metrics.json").exists() and "metrics" in json.loads((folder / "metrics.json").read_text())


def test_a_run_leaves_its_config_its_samples_and_its_row(tmp_path):
    report = run(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    heads = [f"counting__builtin--tiny__{plan}__" for plan in ("eight", "two", "unquantized")]
    assert [name[:-8] for name in names] == heads
    assert all(re.fullmatch("[0-9a-f]{8}", name[-8:]) for name in names)
    folder = place(tmp_path, "two")
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "metrics.json", "samples.jsonl"]
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


@pytest.mark.slow
def test_the_seconds_of_all_attempts_are_added_up(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counting(before=stop_at("two", "2", after=0.05)))
    assert sum(record["seconds"] for record in records(tmp_path, "two")) >= 0.1
    assert run(tmp_path, resume=True).plans[0].seconds >= 0.1


def test_a_row_that_failed_is_kept_with_its_error_until_it_is_measured(tmp_path):
    def broken(subject, sample):
        if (subject.name, sample.name) == ("two", "2"):
            raise QuantizationError("layer 3 keys: NaN")

    run(tmp_path, Counting(before=broken))
    metrics = place(tmp_path, "two") / "metrics.json"
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
    path = place(tmp_path, "two") / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    task = Counting()
    assert run(tmp_path, task, resume=True) == whole
    assert task.measured == [("two", "3")]
    assert [record["number"] for record in records(tmp_path, "two")] == [2, 3, 4, 5]


def test_a_row_that_is_only_read_again_keeps_its_date_and_its_machine(tmp_path):
    run(tmp_path)
    folder = place(tmp_path, "two")
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
    path = place(tmp_path, "two") / "samples.jsonl"
    path.write_bytes(2 * path.read_bytes())
    (row,) = (row for row in run(tmp_path, resume=True).rows if row.plan == "two")
    assert "8 records of 4 samples; leave out --resume" in row.error
    assert not row.metrics


@pytest.mark.parametrize(
    "damage",
    [b'{"tokens": 1\n', b"\xff\xfe\n", b"\n", b"1\n", b'{"tokens": 1}\n', b'{"tokens": NaN}\n', b"[" * 9999 + b"\n"],
)
def test_damage_inside_the_samples_is_an_error_and_not_a_number(tmp_path, damage):
    run(tmp_path)
    path = place(tmp_path, "two") / "samples.jsonl"
    path.write_bytes(damage + path.read_bytes())
    with pytest.raises(DocumentError, match=r"samples\.jsonl: .* line 1 is damaged \(.*\); leave out --resume"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.66])
def test_half_written_settings_are_one_line_that_says_what_to_do(tmp_path, share):
    run(tmp_path)
    path = place(tmp_path, "two") / "config.yaml"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DocumentError, match=r"config\.yaml: .*; leave out --resume to start over") as damaged:
        run(tmp_path, resume=True)
    assert "\n" not in str(damaged.value)
    assert len((path.parent / "samples.jsonl").read_text().splitlines()) == 4, "nothing is lost"


OTHER = [
    ({"settings": Settings(length=512, seed=1)}, "settings.length, settings.seed"),
    ({"info": INFO.model_copy(update={"config_sha256": "00"})}, "model.config_sha256"),
    ({"dtype": "bfloat16"}, "dtype"),
    ({"subjects": (Subject("two", uniform(4, info=INFO)),)}, "plan.short, plan.sha256"),
]


@pytest.mark.parametrize("changed", [changed for changed, _ in OTHER])
def test_a_run_with_other_settings_has_a_folder_of_its_own(tmp_path, changed):
    run(tmp_path)
    before = {path: path.read_bytes() for path in place(tmp_path, "two").iterdir()}
    for resume in (False, True):
        task = Counting()
        run(tmp_path, task, resume=resume, **changed)
        assert (("two", "0") in task.measured) != resume
        assert {path: path.read_bytes() for path in before} == before
        assert len(list(tmp_path.glob("*__two__*"))) == 2


@pytest.mark.parametrize(("changed", "named"), OTHER[:3])
def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path, changed, named):
    run(tmp_path)
    with pytest.raises(EvaluationError, match=f"was measured with another {named}; leave out --resume"):
        run(tmp_path, resume=True, **changed)
    assert len(list(tmp_path.iterdir())) == 3


def test_another_plan_of_a_name_is_measured_from_the_beginning(tmp_path):
    run(tmp_path)
    changed, named = OTHER[3]
    task = Counting()
    with pytest.warns(UserWarning, match=f"nothing to resume .* was measured with another {named}; measured from"):
        run(tmp_path, task, resume=True, **changed)
    assert task.measured == [("two", str(sample)) for sample in range(4)]


def test_a_command_that_was_interrupted_is_resumed_beside_an_older_one_with_other_settings(tmp_path):
    run(tmp_path)
    other = Settings(length=512)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted_at("two", "2"), settings=other)
    task = Counting()
    with pytest.warns(UserWarning, match=r"nothing to resume .*eight.* another settings\.length; measured from"):
        run(tmp_path, task, resume=True, settings=other)
    assert [name for name, _ in task.measured] == ["two"] * 2 + ["eight"] * 4


def test_a_folder_whose_config_was_changed_is_not_gone_on_with(tmp_path):
    run(tmp_path)
    config = place(tmp_path, "two") / "config.yaml"
    config.write_text(config.read_text().replace("length: 1024", "length: 512"))
    with pytest.raises(DocumentError, match=r"settings\.length was 512 and is now 1024; leave out --resume"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("finish", [True, False])
def test_a_larger_limit_goes_on_from_a_smaller_one_which_stays(tmp_path, finish):
    whole = run(tmp_path / "whole")
    if finish:
        run(tmp_path / "cut", settings=FEW)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", interrupted_at("eight", "1"), settings=FEW)
    before = {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    task = Counting()
    assert run(tmp_path / "cut", task, resume=True) == whole
    assert len(task.measured) == 6 if finish else 7
    assert {path: path.read_bytes() for path in before} == before
    assert {sample for name, sample in task.measured if name == "two"} == {"2", "3"}
    again = Counting()
    assert run(tmp_path / "cut", again, resume=True, settings=Settings(limit=4)) == whole, "the default limit"
    assert again.measured == []


def test_samples_that_are_not_the_first_of_more_are_measured_anew(tmp_path):
    class Longest(Counting):
        def samples(self, loaded, settings):
            return super().samples(loaded, settings)[::-1]

    run(tmp_path, Longest(), settings=FEW)
    task = Longest()
    with pytest.warns(UserWarning, match=r"nothing to resume .* another samples\.count, samples\.sha256"):
        run(tmp_path, task, resume=True)
    assert len(task.measured) == 12


def test_a_finished_run_is_replaced_only_when_the_new_one_is_finished(tmp_path):
    before = run(tmp_path)
    kept = {path: path.read_bytes() for path in place(tmp_path, "two").iterdir()}
    with (
        pytest.raises(KeyboardInterrupt),
        pytest.warns(UserWarning, match=r"\(and 1 more\) has these results already; they are measured anew"),
    ):
        run(tmp_path, interrupted_at("two", "3"))
    assert {path: path.read_bytes() for path in kept} == kept
    assert read_run(place(tmp_path, "two")).row == before.plans[0]
    task = Counting()
    assert run(tmp_path, task, resume=True) == before
    assert task.measured == [("two", "3")]
    assert not (place(tmp_path, "two") / "rerun.jsonl").exists()


def test_a_finished_run_stays_if_measuring_it_anew_fails(tmp_path):
    def broken(subject, sample):
        if (subject.name, sample.name) == ("two", "2"):
            raise QuantizationError("layer 3 keys: NaN")

    before = run(tmp_path)
    with pytest.warns(UserWarning, match="measured anew"):
        report = run(tmp_path, Counting(before=broken))
    assert report.plans[0].error == "layer 3 keys: NaN"
    assert read_run(place(tmp_path, "two")).row == before.plans[0]


def test_a_folder_named_by_an_older_version_is_gone_on_with(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", interrupted_at("two", "2"))
    for folder in list((tmp_path / "cut").iterdir()):
        folder.rename(folder.with_name(folder.name[:-10]))
    task = Counting()
    assert run(tmp_path / "cut", task, resume=True) == whole
    assert task.measured[:2] == [("two", "2"), ("two", "3")]
    assert finished(tmp_path / "cut" / "counting__builtin--tiny__two")
    run(tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("*__two*"))) == 2, "measured anew, beside the older one"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["two", "two__{}"])
def test_nothing_is_written_through_a_symbolic_link(tmp_path, resume, name):
    run(tmp_path / "results")
    link = place(tmp_path / "results", "two")
    elsewhere = link.rename(tmp_path / "elsewhere")
    if name == "two":
        link = link.with_name(link.name[:-10])
    link.symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.iterdir()}
    task = Counting()
    if name == "two" and not resume:
        run(tmp_path / "results", task)
    else:
        with pytest.raises(OutputError, match=f"{link.name} is a symbolic link, .*; remove it, or choose another"):
            run(tmp_path / "results", task, resume=resume)
        assert task.measured == []
    assert {path: path.read_bytes() for path in elsewhere.iterdir()} == before


def test_a_task_without_options_says_nothing_of_them_so_that_older_runs_are_gone_on_with(tmp_path):
    run(tmp_path)
    config = (place(tmp_path, "two") / "config.yaml").read_text()
    assert "options" not in config
    assert "machine" not in config


def test_times_are_not_gone_on_with_on_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(Counting, "timed", True)
    run(tmp_path)
    run(tmp_path, resume=True)
    monkeypatch.setattr(work, "machine", lambda device: {"device": "another"})
    task = Counting()
    with pytest.warns(UserWarning, match=r"measured with another machine\.device, machine\."):
        run(tmp_path, task, resume=True)
    assert len(task.measured) == 12


def test_a_command_with_control_characters_makes_a_config_that_can_be_read(tmp_path):
    for resume in (False, True):
        folders = RunFolders(tmp_path, "tiny", resume, "kvmix eval --plan '\x07\x1b[31m'")
        with folders.open("task", "plan", {"a": 1}, ()) as opened:
            text = (opened.folder / "config.yaml").read_text()
        assert yaml.safe_load(text)["a"] == 1
        assert text.startswith("# kvmix eval --plan ")
        assert not {"\x07", "\x1b"} & set(text)


def test_a_folder_that_another_process_measures_into_is_refused_and_left_alone(tmp_path):
    folders = RunFolders(tmp_path, "builtin--tiny")
    with folders.open("counting", "two", {"a": 1}, ()), folders.open("counting", "eight", {"a": 1}, ()) as eight:
        pass
    for path in eight.folder.iterdir():
        path.unlink()
    with held_elsewhere(eight.folder):
        with pytest.raises(StateError, match=r"another process is writing .*eight.*; wait for it, or"):
            folders.open("counting", "eight", {"a": 1}, ())
        assert [path.name for path in eight.folder.iterdir()] == [".config.yaml.lock"]
    folders.open("counting", "eight", {"a": 1}, ()).close()


@pytest.mark.slow
def test_of_two_processes_on_one_output_folder_one_measures_and_the_other_says_why_not(tmp_path):
    run(tmp_path)
    folder = place(tmp_path, "two")
    for path in folder.iterdir():
        path.unlink()
    with held_elsewhere(folder):
        with pytest.raises(StateError, match="another process is writing"):
            run(tmp_path, resume=True)
        assert not (folder / "samples.jsonl").exists()
    assert run(tmp_path, resume=True) == run(tmp_path / "other"), "a killed process keeps nobody out"


@contextmanager
def held_elsewhere(folder):
    """Another process has the folder's run open, until it is killed with SIGKILL."""
    script = "from pathlib import Path; from kvmix_cli.journal import lock; "
    script += f"held = lock(Path({str(folder)!r}, 'config.yaml')); print('locked', flush=True); input()"
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
    with monkeypatch.context() as patch:
        patch.setattr(journal, "SYNC_SECONDS", -1)
        patch.setattr(os, "fsync", full_for(place(tmp_path, "two") / "samples.jsonl"))
        with pytest.raises(OutputError, match=r"two.*/samples\.jsonl: No space left on device; make room, .*--resume"):
            run(tmp_path, resume=True)
    assert run(tmp_path, resume=True) == run(tmp_path / "other")


def test_a_disk_that_is_full_when_the_row_is_written_says_that_all_samples_are_kept(tmp_path, monkeypatch):
    def full(path, text):
        if path.name == "metrics.json":
            raise OutputError(f"cannot write {path}: No space left on device")
        return write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr("kvmix_cli.evaluation.run_folder.write_text", full)
        with pytest.raises(
            OutputError, match=r"metrics\.json: No space .*; all samples are kept: continue with --resume"
        ):
            run(tmp_path)
    task = Counting()
    assert run(tmp_path, task, resume=True) == run(tmp_path / "other")
    assert ("unquantized", "0") not in task.measured


def full_for(path):
    """An `fsync` that fails for this file, and for the copy that is renamed to it."""
    sync = os.fsync

    def fsync(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink() == path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    return fsync


def test_names_of_plans_make_folders_that_differ():
    names = ["two", "0-3:k4v4,4-7:k2v2", "0-3-k4v4-4-7-k2v2", "../up", "a/b", "a b", "x" * 300, "x" * 301, "\udcff"]
    safe = [safe_name(name) for name in names]
    assert len(set(safe)) == len(names)
    assert all("/" not in name and len(name.encode()) <= 78 for name in safe)
    assert safe[0] == "two"


@pytest.mark.parametrize("long", ["x" * 300, "\u6a21" * 200, "0-3:k4v4," * 60])
def test_no_name_of_a_folder_is_too_long(tmp_path, long):
    """Found before any measuring: a file system takes names of 255 bytes."""
    folders = RunFolders(tmp_path, long)
    with folders.open(long, long, {"a": 1}, ()) as opened:
        assert len(opened.folder.name.encode()) <= 255
    assert len(folders.picture(long, []).name.encode()) <= 255


@pytest.mark.slow
@pytest.mark.parametrize("timed", [False, True])
def test_a_kill_before_any_access_to_a_file_loses_at_most_the_sample_in_hand(tmp_path, monkeypatch, timed):
    """Resume from what is on the disk before the first, second, third, ... access, and after the last.

    Rows take turns where times are taken.
    """
    monkeypatch.setattr(Counting, "timed", timed)
    whole = run(tmp_path / "whole", settings=FEW)
    moments = list(kills_of(tmp_path / "out"))
    for left, first in moments:
        second = Counting()
        assert run(left, second, resume=True, settings=FEW) == whole
        again = set(first) & set(second.measured)
        assert len(again) <= 1, "more than the sample in hand was measured twice"
        assert len(first) + len(second.measured) == 6 + len(again)
    assert len(moments) > 30
    assert second.measured == []


@pytest.mark.slow
def test_a_kill_while_a_finished_run_is_measured_anew_loses_nothing_finished(tmp_path):
    """At every moment each folder has a finished row, or all samples of one; resuming then gives the same row."""
    whole = run(tmp_path / "out", settings=FEW)
    moments = list(kills_of(tmp_path / "out"))
    for left, _ in moments:
        for name in ("unquantized", "two", "eight"):
            folder = place(left, name)
            assert finished(folder) or (folder / "samples.jsonl").read_text().count("\n") == 2
        assert run(left, resume=True, settings=FEW) == whole
    assert len(moments) > 30


def kills_of(folder):
    """Yield what SIGKILL would leave of a run at every access to a file, and what had been measured by then.

    A process that is killed leaves what it has handed to the operating system, and none of its buffers: a copy of the
    folder at that moment. One process is enough to take all of them; it is another because an audit hook stays.
    """
    copies = folder.with_name(f"{folder.name}-killed")
    copies.mkdir()
    child = os.fork()
    if not child:
        _run_and_copy(folder, copies)
    assert os.waitpid(child, 0)[1] == 0
    for note in sorted(copies.glob("*.txt")):
        yield note.with_suffix(""), [tuple(line.split()) for line in note.read_text().splitlines()]


def _run_and_copy(folder, copies):
    """Run the task with a copy of the folder before each access; never return."""
    measured, numbers = [], count()
    is_copying = False

    def copy():
        nonlocal is_copying
        is_copying = True
        place = copies / f"{next(numbers):04}"
        shutil.copytree(folder, place, symlinks=True) if folder.exists() else place.mkdir()
        place.with_suffix(".txt").write_text("".join(f"{plan} {sample}\n" for plan, sample in measured))
        is_copying = False

    def audit(event, arguments):
        changes = event in ("open", "os.mkdir", "os.remove", "os.rename")
        if changes and not is_copying and str(arguments[0]).startswith(f"{folder}{os.sep}"):
            copy()

    task = Counting(before=lambda subject, sample: measured.append((subject.name, sample.name)))
    try:
        sys.addaudithook(audit)
        run(folder, task, settings=FEW)
        copy()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.slow
def test_a_killed_evaluation_resumes_to_the_same_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["eval", "--model", "builtin:tiny", "--uniform", "2", "--device", "cpu"]
    arguments += ["--length", "332", "--prefix", "300", "--step", "4", "--limit", "4"]
    with (tmp_path / "said.txt").open("w") as said:
        process = forking.start(*arguments, stdout=said, stderr=said)
    deadline = time.monotonic() + 120
    samples = None
    while not (samples and samples.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
        samples = next(tmp_path.glob("results/perplexity__builtin--tiny__uniform-2__*/samples.jsonl"), None)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    left = samples.read_text()
    assert 1 <= left.count("\n") < 4

    resumed, afresh = (kvmix_json(*arguments, *more) for more in (["--resume"], ["--output-dir", "afresh"]))
    kept = [json.loads(line) for line in left[: left.rfind("\n") + 1].splitlines()]
    assert [json.loads(line) for line in samples.read_text().splitlines()][: len(kept)] == kept
    for one, other in zip(resumed["rows"], afresh["rows"], strict=True):
        assert one["quantized_share"] == other["quantized_share"]
        for name, estimate in one["metrics"].items():
            assert estimate == pytest.approx(other["metrics"][name], rel=1e-5, abs=1e-6)
