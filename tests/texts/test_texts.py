"""Documents from every kind of source, and what happens where there are none."""

import json
from pydoc_data.topics import topics

import pytest

from kvmix_cli import texts
from kvmix_cli.errors import TextError
from kvmix_cli.texts import HELD_OUT_MODULES, load_texts


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def failure(source):
    with pytest.raises(TextError) as error:
        load_texts(str(source))
    assert "\n" not in str(error.value)
    return str(error.value)


# Built-in text


def test_the_two_sides_of_the_builtin_text_never_meet():
    calibration, held_out = load_texts(), load_texts(held_out=True)
    assert len(calibration) == len(set(calibration)) > 50
    assert len(held_out) == len(set(held_out)) > 50
    assert not set(calibration) & set(held_out)


def test_topics_are_held_out_by_rule():
    held_out, calibration = set(load_texts(held_out=True)), set(load_texts())
    assert topics["lambda"] in calibration  # crc32 % 4 == 2
    assert topics["for"] in held_out  # crc32 % 4 == 0
    assert topics["if"] in calibration, "crc32 % 4 == 0, but the same text is also the topic 'else'"
    assert all((text in held_out) != (text in calibration) for text in topics.values())


def test_modules_are_held_out_by_name():
    import argparse
    import asyncio.locks
    import csv
    import inspect

    held_out, calibration = load_texts(held_out=True), load_texts()
    for module in (argparse, asyncio.locks):
        assert inspect.getsource(module) in held_out
    assert inspect.getsource(csv) in calibration
    assert len(HELD_OUT_MODULES) == 16
    assert not HELD_OUT_MODULES & texts.CALIBRATION_MODULES


def test_builtin_text_is_the_same_every_time():
    assert load_texts(seed=1) == load_texts(seed=2)


# Files and folders


def test_a_file_is_a_document(tmp_path):
    file = tmp_path / "notes.md"
    file.write_bytes("\ufeffÄ first line\nand another\n".encode())
    assert load_texts(str(file)) == ["Ä first line\nand another\n"]


def test_a_jsonl_has_a_document_a_line(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [
        {"text": "one", "id": 1},
        {"prompt": "two"},
        {"content": "three"},
        {"context": "long", "input": "question", "answers": []},
        {"input": "four"},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert load_texts(str(file)) == ["one", "two", "three", "long\n\nquestion", "four"]


def test_a_folder_is_all_its_text_files(tmp_path):
    for name, text in {"b.txt": "B", "a/x.py": "A", ".hidden": "no", ".git/config": "no", "c.jsonl": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "weights.bin").write_bytes(b"\0\1\2" * 100)
    assert load_texts(str(tmp_path)) == ["A", "B"]


@pytest.mark.parametrize("content", [b"", b"  \n\t\n"])
def test_blank_files_are_an_error(tmp_path, content):
    file = tmp_path / "blank.txt"
    file.write_bytes(content)
    assert f"no text in {file}" in failure(file)


def test_an_empty_folder_is_an_error(tmp_path):
    assert f"no text in {tmp_path}" in failure(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert f"no text in {tmp_path}" in failure(tmp_path)


def test_a_missing_file_is_an_error(tmp_path):
    assert "no such file or folder" in failure(tmp_path / "missing.txt")
    assert "hub:NAME" in failure("some/dataset")


def test_a_binary_file_is_an_error(tmp_path):
    file = tmp_path / "picture.txt"
    file.write_bytes(b"PNG\0\0")
    assert failure(file) == f"{file} is a binary file: give UTF-8 text"


def test_undecodable_text_is_an_error(tmp_path):
    file = tmp_path / "old.txt"
    file.write_bytes("Größe".encode("latin-1"))
    assert f"{file} is not UTF-8 text (byte 2)" in failure(file)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not valid JSON"),
        ("[1, 2]", "expected an object with a field 'text', got list"),
        ('{"title": "x", "text": 3}', "needs a text field .* it has title, text"),
        ("{}", "it has nothing"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    file = tmp_path / "data.jsonl"
    file.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(TextError, match=f"data.jsonl, line 3: .*{reason}"):
        load_texts(str(file))


# Data sets


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in (("train", 12), ("test", 3)):
        rows = (json.dumps({"text": f"{split} {i}"}) for i in range(count))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def test_a_data_set(dataset):
    assert load_texts(f"hub:{dataset}") == [f"train {i}" for i in range(12)]
    assert load_texts(f"hub:{dataset}::test") == [f"test {i}" for i in range(3)]
    assert load_texts(f"hub:{dataset}:default:test") == [f"test {i}" for i in range(3)]


def test_of_a_large_data_set_some_rows_are_taken(dataset, monkeypatch):
    monkeypatch.setattr(texts, "MAX_ROWS", 5)
    first, again, other = (load_texts(f"hub:{dataset}", seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert len(first) == len(set(first)) == 5
    assert set(first) != set(other)


def test_a_data_set_that_is_not_there(dataset):
    assert "cannot load data set nobody/nothing" in failure("hub:nobody/nothing")
    assert "split nope" in failure(f"hub:{dataset}::nope")
    assert "configuration nope" in failure(f"hub:{dataset}:nope")
    assert "names no data set" in failure("hub:")


def test_a_data_set_without_text(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"label": 1}')
    assert "row 0: needs a text field" in failure(f"hub:{tmp_path / 'set'}")
