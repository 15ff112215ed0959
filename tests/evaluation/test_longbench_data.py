import json
import zipfile

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from longbench_files import lines, pack, record, write

from kvmix_cli.errors import EvaluationError
from kvmix_cli.evaluation.tasks.longbench import data
from kvmix_cli.evaluation.tasks.longbench.datasets import DATASETS

QASPER = DATASETS["qasper"]


def read(folder, dataset=QASPER, strict=False):
    return data.read_questions(data.open_source(folder), f"{dataset.name}.jsonl", dataset, strict)


@pytest.fixture
def plain(tmp_path):
    return write(tmp_path / "plain", *DATASETS)


def test_all_data_sets_are_read_in_the_official_schema(plain):
    for dataset in DATASETS.values():
        entries = read(plain, dataset)
        assert [entry.line for entry in entries.questions] == [1, 2]
        for number, entry in enumerate(entries.questions):
            wanted = record(dataset.name, number)
            assert (entry.input, entry.context) == (wanted["input"], wanted["context"])
            assert (list(entry.answers), entry.length) == (wanted["answers"], wanted["length"])
            assert list(entry.classes) == (wanted["all_classes"] or [])
        assert entries.notice is None


def test_a_folder_a_folder_in_it_and_an_archive_hold_the_same(plain, tmp_path):
    nested = tmp_path / "nested"
    write(nested / "data", "qasper")
    archived = tmp_path / "archived"
    archived.mkdir()
    archive = pack(plain, archived / "data.zip")
    found = [read(place).questions for place in (plain, nested, archived, archive)]
    assert all(one == found[0] for one in found)


def test_the_hub_is_asked_for_the_archive_of_the_data_set(plain, tmp_path, monkeypatch):
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return str(pack(plain, tmp_path / "data.zip"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read(None).questions == read(plain).questions
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")]


def test_without_a_network_the_error_says_what_to_download(monkeypatch):
    def offline(*arguments, **options):
        raise LocalEntryNotFoundError("Cannot find the requested files in the disk cache. Set it.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(EvaluationError, match=r"cannot fetch LongBench from the hub: Cannot find .*--data-dir"):
        read(None)


FAULTS = [
    ("not json", r"not valid JSON \(Expecting value, character 1\)"),
    ("[" * 100_000, r"not valid JSON"),
    ("[1]", "expected an object, got list"),
    (json.dumps({"input": "only this"}), "'answers' must be a list of texts"),
    (json.dumps(record("qasper", answers=[])), "no answers"),
    (json.dumps(record("qasper", answers="yes")), "'answers' must be a list of texts"),
    (json.dumps(record("qasper", answers=["yes", 1])), "'answers' must be a list of texts"),
    (json.dumps(record("qasper", context=None)), "'context' must be a text"),
    (json.dumps(record("qasper", input=3)), "'input' must be a text"),
    (json.dumps(record("qasper", length="long")), "'length' must be a number of words"),
    (json.dumps(record("qasper", length=True)), "'length' must be a number of words"),
    (json.dumps(record("qasper", context="half \ud83d")), "'context' holds half a character"),
]


@pytest.mark.parametrize(("line", "said"), FAULTS)
def test_a_malformed_line_is_counted_named_and_skipped_or_fatal(line, said, tmp_path):
    (tmp_path / "qasper.jsonl").write_text(lines([record("qasper")]) + line + "\n" + lines([record("qasper", 1)]))
    entries = read(tmp_path)
    assert [entry.line for entry in entries.questions] == [1, 3]
    assert entries.notice.startswith(f"{tmp_path.name}/qasper.jsonl: skipped 1 malformed line of 3 (line 2: ")
    with pytest.raises(EvaluationError, match=rf"{tmp_path.name}/qasper\.jsonl, line 2: {said}.*--strict"):
        read(tmp_path, strict=True)


def test_bytes_that_are_no_text_are_a_malformed_line(tmp_path):
    (tmp_path / "qasper.jsonl").write_bytes(b"\xff\xfe\n" + lines([record("qasper")]).encode())
    assert read(tmp_path).faults == ("line 1: not UTF-8",)


def test_many_malformed_lines_are_counted_but_not_all_named(tmp_path):
    (tmp_path / "qasper.jsonl").write_text("{\n" * 5 + lines([record("qasper")]))
    notice = read(tmp_path).notice
    assert "skipped 5 malformed lines of 6 (line 1: " in notice
    assert notice.count("line ") == 3
    assert notice.endswith("...)")


@pytest.mark.parametrize(("name", "answer"), [("passage_retrieval_en", "段落2"), ("passage_retrieval_zh", "2")])
def test_an_answer_that_the_metric_cannot_read_is_a_malformed_line(name, answer, tmp_path):
    text = lines([record(name), record(name, answers=[answer])])
    (tmp_path / f"{name}.jsonl").write_text(text)
    assert read(tmp_path, DATASETS[name]).faults[0].startswith(f"line 2: answers of {name} must look like")


def test_a_classification_needs_its_classes(tmp_path):
    (tmp_path / "trec.jsonl").write_text(lines([record("trec"), record("trec", all_classes=None)]))
    assert read(tmp_path, DATASETS["trec"]).faults == ("line 2: 'all_classes' must be a list of texts",)


def test_only_a_line_feed_ends_a_line(tmp_path):
    odd = record("qasper", context="one\u2028two\x85three\x0cfour")
    text = "\ufeff" + lines([odd]).replace("\n", "\r\n") + "  \r\n" + lines([record("qasper")])
    (tmp_path / "qasper.jsonl").write_text(text, encoding="utf-8", newline="")
    entries = read(tmp_path)
    assert [entry.line for entry in entries.questions] == [1, 3]
    assert entries.questions[0].context == odd["context"]
    assert entries.faults == ()


def test_a_missing_data_set_is_an_error_with_those_that_are_there(tmp_path):
    write(tmp_path, "qasper_e", "trec")
    with pytest.raises(EvaluationError, match=r"no qasper\.jsonl \(did you mean 'qasper_e\.jsonl'\?\); .*trec\.jsonl"):
        read(tmp_path)


def test_all_files_that_are_missing_are_named_with_the_nearest_that_are_there(tmp_path):
    write(tmp_path, "qasper")
    write(tmp_path, "LongBench-trec-test", "repobench_p")
    (tmp_path / "lcc.parquet").write_bytes(b"")
    source = data.open_source(tmp_path)
    data.check_names(source, ["qasper.jsonl"])
    wanted = [f"{name}.jsonl" for name in ("qasper", "trec", "lcc", "repobench-p", "samsum", "vcsum")]
    with pytest.raises(EvaluationError) as error:
        data.check_names(source, wanted)
    assert str(error.value) == (
        f"{tmp_path} has no trec.jsonl (did you mean 'LongBench-trec-test.jsonl'?), "
        "lcc.jsonl (did you mean 'lcc.parquet'?), repobench-p.jsonl (did you mean 'repobench_p.jsonl'?) "
        "and 2 more of the files that it needs; it has LongBench-trec-test.jsonl, qasper.jsonl, repobench_p.jsonl; "
        "a file is named after its data set: rename it, or choose data sets with --task longbench:NAME,..."
    )


def test_a_place_without_records_is_told_what_there_is(tmp_path):
    (tmp_path / "qasper.json").write_text("{}")
    with pytest.raises(EvaluationError, match=r"has no \*\.jsonl, .* but qasper\.json: download"):
        data.open_source(tmp_path)
    write(tmp_path / "LongBench", "qasper")
    with pytest.raises(EvaluationError, match=r"has no \*\.jsonl, .* \(did you mean '.*/LongBench'\?\): download"):
        data.open_source(tmp_path)


@pytest.mark.parametrize("text", ["", "\n\n", "{}\n{}\n"])
def test_a_file_without_any_record_is_an_error(text, tmp_path):
    (tmp_path / "qasper.jsonl").write_text(text)
    with pytest.raises(EvaluationError, match=r"no record in .*qasper\.jsonl" + ("$" if not text.strip() else ": .*2")):
        read(tmp_path)


def test_a_place_without_data_is_an_error_with_advice(tmp_path):
    (tmp_path / "file.txt").write_text("this")
    (tmp_path / "empty").mkdir()
    for name, said in (("file.txt", "no folder and no zip"), ("nowhere", "no folder"), ("empty", r"no \*\.jsonl")):
        with pytest.raises(EvaluationError, match=rf"{name} .*{said}.*--data-dir"):
            data.open_source(tmp_path / name)


def test_a_damaged_archive_is_an_error(plain, tmp_path):
    archive = pack(plain, tmp_path / "data.zip")
    archive.write_bytes(archive.read_bytes()[:-300])
    with pytest.raises(EvaluationError, match=r"cannot read .*data\.zip: File is not a zip file"):
        read(tmp_path)


def test_a_damaged_member_of_an_archive_is_an_error(plain, tmp_path):
    archive = pack(plain, tmp_path / "data.zip")
    whole = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as opened:
        start = opened.getinfo("data/qasper.jsonl").header_offset
    whole[start + 60] ^= 0xFF
    archive.write_bytes(bytes(whole))
    with pytest.raises(EvaluationError, match=r"cannot read qasper\.jsonl of .*: Bad CRC-32"):
        read(tmp_path)
