"""Processes that share the rows of a sweep: every row is measured once, whoever is killed meanwhile."""

import json
import random
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import forking
import pytest
from evaluating import run_folder
from sweeping import FEW, SAMPLES, SUBJECTS, TASKS, sweep

from kvmix_cli import journal, turns
from kvmix_cli.errors import DocumentError, InUseError
from kvmix_cli.evaluation import work
from kvmix_cli.evaluation.run_folder import CONFIG, METRICS
from kvmix_cli.evaluation.run_folder import SAMPLES as RECORDS
from kvmix_cli.turns import first_free, take_turns

ROWS = ["unquantized", *(subject.name for subject in FEW)]
WORKERS, KILLS = 4, 6


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(turns, "PAUSE", 0.001)


def begun(root):
    """How often each sample was begun."""
    return Counter(Path(root, "notes.txt").read_text().splitlines())


def busy(times, result):
    """A piece of work that another process is at, so many times."""
    left = [times]

    def work():
        left[0] -= 1
        if left[0] >= 0:
            raise InUseError("another process is at it")
        return result

    return work


def test_work_of_others_is_come_back_to():
    order = []

    def noted(work):
        result = work()
        order.append(result)
        return result

    works = [partial(noted, busy(times, name)) for times, name in ((2, "a"), (0, "b"), (1, "c"))]
    assert take_turns(works) == ["a", "b", "c"]
    assert order == ["b", "c", "a"] or order == ["b", "a", "c"]
    assert take_turns([]) == []


def test_the_first_piece_that_is_free_is_done():
    assert first_free([busy(5, "a"), busy(1, "b"), busy(2, "c")]) == "b"


def test_one_process_finishes_a_sweep_and_another_finds_it_done(tmp_path):
    first, again = sweep(tmp_path), sweep(tmp_path)
    assert [[row.plan for row in report.rows] for report in first] == [ROWS] * 2
    assert first == again
    assert set(begun(tmp_path).values()) == {1}
    assert len(begun(tmp_path)) == len(TASKS) * len(ROWS) * SAMPLES


@pytest.mark.parametrize("held", ROWS[:2])
def test_a_row_that_another_process_is_at_is_left_to_it(tmp_path, monkeypatch, held):
    """Everything else is measured meanwhile; without the unquantized row the others wait for it with their records."""
    sweep(tmp_path, subjects=FEW[:0] if held == "unquantized" else FEW[:1])
    before = begun(tmp_path)
    lock = journal.lock(run_folder(tmp_path, held, "first", "m") / CONFIG)
    seen = []

    def pause(seconds):
        seen.append(begun(tmp_path) - before)
        journal.release(lock)

    monkeypatch.setattr(turns, "time", SimpleNamespace(sleep=pause))
    sweep(tmp_path)
    assert len(seen) == 1
    assert sum(seen[0].values()) == (len(TASKS) * len(ROWS) * SAMPLES - sum(before.values()))
    assert set(begun(tmp_path).values()) == {1}


def test_rows_that_read_side_by_side_are_taken_a_few_at_a_time():
    task = type("", (), {"timed": False, "side_by_side": True})
    size = partial(work.TaskWork._share, type("", (), {"task": task}))
    assert [size(left) for left in (1, 7, 8, 25, 100)] == [1, 1, 2, 6, work.TOGETHER]


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_damaged_row_is_discarded_with_one_line_and_measured_again(tmp_path, is_finished):
    sweep(tmp_path)
    folder = run_folder(tmp_path, "plan-2", "first", "m")
    whole = (folder / RECORDS).read_text().splitlines()
    (folder / RECORDS).write_text("\n".join([whole[0], whole[1][:9], *whole[2:]]) + "\n")
    if not is_finished:
        (folder / METRICS).unlink()
    before = begun(tmp_path)
    with pytest.warns(UserWarning, match=r"samples\.jsonl is damaged, so its row is measured anew") as said:
        sweep(tmp_path)
    assert len(said) == 1
    again = begun(tmp_path) - before
    assert set(again) == {f"first plan-2 {number}" for number in range(SAMPLES)}
    strip = [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in whole]
    now = [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]
    assert [{key: value for key, value in record.items() if key != "seconds"} for record in now] == strip
    assert "metrics" in json.loads((folder / METRICS).read_text())


def test_a_half_written_result_is_written_again_from_its_records(tmp_path):
    sweep(tmp_path)
    path = run_folder(tmp_path, "plan-2", "first", "m") / METRICS
    whole, before = json.loads(path.read_text()), begun(tmp_path)
    path.write_text(path.read_text()[:40])
    with pytest.warns(UserWarning, match=r"metrics\.json is damaged, so it is written anew"):
        sweep(tmp_path)
    assert json.loads(path.read_text())["metrics"] == whole["metrics"]
    assert begun(tmp_path) == before


def test_alone_a_damaged_row_is_an_error(tmp_path):
    from kvmix_cli.evaluation.runs import RunFolders

    sweep(tmp_path)
    folder = run_folder(tmp_path, "plan-2", "first", "m")
    (folder / RECORDS).write_text("{\n")
    config = {"task": "first"}
    alone = RunFolders(tmp_path, "m", resume=True)
    run = alone.open("first", "other", config, [1])
    run.close()
    (run.folder / RECORDS).write_text("{\n")
    with pytest.raises(DocumentError, match="is damaged"):
        alone.open("first", "other", config, [1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_killed_workers_lose_no_row_and_none_is_measured_twice(tmp_path):
    imports = forking.Imports((*forking.HEAVY.modules, "sweeping"), forking.HEAVY.settings)
    code = f"import sweeping; sweeping.sweep({str(tmp_path)!r}, sweeping.SUBJECTS, 0.02)"
    start = partial(forking.start, code=code, imports=imports)
    chance, killed = random.Random(0), 0
    workers = [start() for _ in range(WORKERS)]
    while killed < KILLS and any(worker.poll() is None for worker in workers):
        time.sleep(chance.uniform(0.05, 0.15))
        number = chance.randrange(WORKERS)
        if workers[number].poll() is None:
            workers[number].kill()
            killed += workers[number].wait() == -signal.SIGKILL
            workers[number] = start()
    assert [worker.wait() for worker in workers] == [0] * WORKERS
    rows = ["unquantized", *(subject.name for subject in SUBJECTS)]
    for task in TASKS:
        for row in rows:
            folder = run_folder(tmp_path, row, task, "m")
            assert len((folder / RECORDS).read_text().splitlines()) == SAMPLES
            assert "metrics" in json.loads((folder / METRICS).read_text())
    twice = sum(count - 1 for count in begun(tmp_path).values())
    assert twice <= killed, "only a sample in hand is begun again"
    assert len(begun(tmp_path)) == len(TASKS) * len(rows) * SAMPLES
