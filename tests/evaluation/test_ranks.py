"""Ranks that share samples, in threads: every rank comes to the results of one process, and one of them keeps files."""

import json
import threading

import pytest
from evaluating import INFO, Counting, run_folder, stand_in, uniform
from ranking import together

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError, KvmixError, QuantizationError
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.runner import run_task
from kvmix_cli.evaluation.runs import RunFolders
from kvmix_cli.ranks import ALONE, PART_BYTES, Ranks

TWO = Subject("two", uniform(2, info=INFO))
MANY = Settings(limit=7)


def measure(ranks, folder=None, task=None, resume=False, settings=MANY):
    """The report of one rank, and what it measured itself."""
    folders = RunFolders(folder, "m", resume) if folder else None
    task = task or Counting()
    return run_task(task, stand_in(ranks=ranks), [TWO], settings, folders), task.measured


def kept(folder, row="two"):
    lines = (run_folder(folder, row, "counting", "m") / "samples.jsonl").read_text().splitlines()
    return [json.loads(line)["number"] for line in lines]


# Messages


@pytest.mark.parametrize("data", [b"", b"few bytes", bytes(range(256)) * (PART_BYTES // 200)], ids=len)
def test_the_leaders_bytes_are_everybodys(data):
    assert together(lambda ranks: ranks.agree(data if ranks.leads else b"mine"), world=3) == [data] * 3


def test_a_message_reaches_the_leader_under_its_number():
    def work(ranks):
        topic = ranks.topic()
        if ranks.leads:
            return ranks.receive(topic, 5), ranks.receive(topic, 3)
        return ranks.send(topic, 3, b"three"), ranks.send(topic, 5, b"five")

    assert together(work)[0] == (b"five", b"three")


def test_alone_nothing_is_sent():
    assert ALONE.agree(b"mine") == b"mine"
    assert ALONE.share(range(3)) == [0, 1, 2]
    assert ALONE.leads and ALONE.claim_failure(1)


def test_every_sample_is_of_one_rank():
    ranks = [Ranks(rank, 3) for rank in range(3)]
    assert sorted(number for each in ranks for number in each.share(range(10))) == list(range(10))
    assert all(Ranks(rank, 3, is_sharded=True).share(range(4)) == [0, 1, 2, 3] for rank in range(3))


def test_the_first_to_fail_reports_and_the_others_end_with_its_code():
    def work(ranks):
        if ranks.rank == 1:
            return ranks.claim_failure(3), ranks.claim_failure(4)
        with pytest.raises(SystemExit) as ended:
            ranks.receive("never", 0)
        return ended.value.code, ranks.claim_failure(1)

    assert together(work) == [(3, False), (True, False)]


def test_before_they_have_met_the_leader_reports():
    assert [Ranks(rank, 2).claim_failure(1) for rank in range(2)] == [True, False]


# Evaluations


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_come_to_the_report_of_one_process_and_measure_each_sample_once(tmp_path, world):
    alone, _ = measure(ALONE, tmp_path / "alone")
    found = together(lambda ranks: measure(ranks, tmp_path / "together"), world)
    assert all(report == alone for report, _ in found)
    assert all(report.rows[1].records == alone.rows[1].records for report, _ in found)
    for rank, (_, measured) in enumerate(found):
        assert [name for row, name in measured if row == "two"] == [str(n) for n in range(7) if n % world == rank]
    assert kept(tmp_path / "together") == kept(tmp_path / "alone")


def test_an_interrupted_run_goes_on_with_another_number_of_ranks(tmp_path):
    def stop(subject, sample):
        if (subject.name, sample.name) == ("two", "4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together(lambda ranks: measure(ranks, tmp_path, Counting(before=stop)))
    assert kept(tmp_path) == [2, 3, 4, 5]
    found = together(lambda ranks: measure(ranks, tmp_path, resume=True), 3)
    assert found[0][0] == measure(ALONE)[0]
    assert sorted(name for _, measured in found for row, name in measured if row == "two") == ["4", "5", "6"]
    assert kept(tmp_path) == list(range(2, 9))


@pytest.mark.parametrize("failing", [2, 3])
def test_a_sample_that_fails_on_any_rank_ends_the_row_on_all(tmp_path, failing):
    def fail(subject, sample):
        if (subject.name, sample.name) == ("two", str(failing)):
            raise QuantizationError(f"NaN in sample {failing}")

    found = together(lambda ranks: measure(ranks, tmp_path, Counting(before=fail)))
    assert {report.rows[1].error for report, _ in found} == {f"NaN in sample {failing}"}
    assert kept(tmp_path) == list(range(2, 2 + failing))


def test_an_error_that_ends_the_command_ends_it_on_all_ranks(tmp_path):
    class Damaged(KvmixError):
        pass

    def fail(subject, sample):
        if sample.name == "3":
            raise Damaged

    ended = []

    def work(ranks):
        try:
            measure(ranks, tmp_path, Counting(before=fail))
        except (Damaged, SystemExit) as error:
            ended.append(type(error))
            ranks.claim_failure(1)

    before = threading.active_count()
    together(work)
    assert sorted(each.__name__ for each in ended) == ["Damaged", "SystemExit"]
    assert threading.active_count() == before


def test_times_and_bytes_are_the_leaders(tmp_path):
    class Local(Counting):
        is_local = True

    found = together(lambda ranks: measure(ranks, tmp_path, Local()))
    assert [len(measured) for _, measured in found] == [14, 0]
    assert found[0][0] == found[1][0]
    with pytest.raises(EvaluationError, match="drop --tensor-parallel"):
        measure(Ranks(0, 2, is_sharded=True), task=Local())


def test_parts_of_a_model_measure_every_sample_and_the_leader_keeps_it(tmp_path):
    found = together(lambda ranks: measure(ranks, tmp_path), is_sharded=True)
    assert [len(measured) for _, measured in found] == [14, 14]
    assert found[0][0] == found[1][0] == measure(ALONE)[0]
    assert kept(tmp_path) == list(range(2, 9))
