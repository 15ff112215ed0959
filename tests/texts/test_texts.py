"""Documents from every kind of source, and what happens where there are none."""

import csv
import gzip
import json
import os
import shutil
import threading
import warnings
from pydoc_data.topics import topics

import pyarrow.parquet
import pytest
from evaluating import tiny

from kvmix_cli import texts
from kvmix_cli.errors import FieldsLeftOut, TextError
from kvmix_cli.texts import HELD_OUT_MODULES, describe_texts, is_one_document, load_texts, named, prose, read_text
from kvmix_cli.texts.chat import prompt_ids
from kvmix_cli.texts.tokens import beginning, encode


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
    assert len(calibration) == len(set(calibration)) > 30
    assert len(held_out) == len(set(held_out)) > 50
    joined = "".join(calibration)
    assert not any(text in joined for text in held_out)


def test_topics_are_held_out_by_rule():
    held_out, calibration = set(load_texts(held_out=True)), "".join(load_texts())
    assert topics["lambda"] in calibration  # crc32 % 4 == 2
    assert topics["for"] in held_out  # crc32 % 4 == 0
    assert topics["if"] in calibration, "crc32 % 4 == 0, but the same text is also the topic 'else'"
    assert all((text in held_out) != (text in calibration) for text in topics.values())


def test_half_of_the_documents_to_calibrate_on_are_prose_of_a_page_or_two():
    calibration, written = load_texts(), prose()
    assert calibration[: len(written)] == written
    assert calibration[len(written) :] == load_texts("builtin-library")
    assert len(calibration) == 2 * len(written)
    assert load_texts("builtin-library", held_out=True) == load_texts(held_out=True)
    assert all(4000 < len(text) < 8000 for text in written), "about a sample of 1,024 tokens each"
    assert all(text.isprintable() for text in "".join(written).split("\n"))


def test_modules_are_held_out_by_name():
    import argparse
    import asyncio.locks
    import csv
    import inspect

    held_out, calibration = load_texts(held_out=True), "".join(load_texts())
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
        ("[" * 10_000, "not valid JSON"),
        ('{"instruction": "x", "input": 3}', "field 'input' is int, not text"),
        ('{"question": "x", "context": {"title": ["y"]}}', "field 'context' has a message without text; it has title"),
        ('{"messages": [{"role": "user"}]}', "field 'messages' has a message without text; it has role"),
        ('{"title": "x", "text": 3}', "needs a text field .* it has title, text"),
        ("{}", "it has nothing"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    file = tmp_path / "data.jsonl"
    file.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(TextError, match=f"data.jsonl, line 3: .*{reason}"):
        load_texts(str(file))


RECORDS = [
    ({"text": "one", "url": "u"}, "one"),
    (
        {"instruction": "Translate.", "input": "Good morning", "output": "Bonjour"},
        "Translate.\n\nGood morning\n\nBonjour",
    ),
    ({"instruction": "Sum up.", "input": "", "output": "It grows."}, "Sum up.\n\nIt grows."),
    ({"instruction": "a", "input": "b", "output": "c", "text": "all of it"}, "all of it"),
    ({"instruction": "a", "context": "b", "response": "c", "category": "d"}, "a\n\nb\n\nc"),
    ({"prompt": "a", "completion": "b"}, "a\n\nb"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a\n\nb"),
    ({"question": "a", "answer": "b"}, "a\n\nb"),
    ({"answer": "b", "context": "c", "question": "a"}, "c\n\na\n\nb"),
    ({"article": "a", "highlights": "b", "id": "1"}, "a\n\nb"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a\n\nb"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "a\n\nb"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "a"),
    ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}, "a\n\nb"),
    ({"context": "a", "input": "b", "answers": ["c"], "length": 3, "all_classes": None}, "a\n\nb"),
    ({"instruction": "a", "input": None, "output": "b"}, "a\n\nb"),
]
"""One record of each format, and its document."""


@pytest.mark.parametrize(("record", "text"), RECORDS)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_every_record_format_is_read_whole(tmp_path, name, record, text):
    file = tmp_path / name
    file.write_text(json.dumps(record) + "\n" + json.dumps(record))
    assert load_texts(str(file)) == [text, text]


LEFT_OUT = [
    ({"question": "What?", "choices": ["a", "b"], "answer": "a"}, ["question", "answer"], ["choices"]),
    ({"context": "c", "question": "q", "answers": {"text": ["a"]}}, ["context", "question"], ["answers"]),
    ({"text": "t", "url": "u", "meta": {}, "label": None}, ["text"], ["url"]),
    ({"messages": [{"role": "user", "content": "x"}], "id": 3}, ["messages"], ["id"]),
]


@pytest.mark.parametrize(("record", "read", "left_out"), LEFT_OUT)
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_fields_that_are_not_read_are_said(tmp_path, ending, record, read, left_out):
    """Once for a source, in every format; a field that holds nothing in any record is not missed."""
    path = tmp_path / f"rows.{ending}"
    if ending == "csv":
        record = {name: value if isinstance(value, str) else "" for name, value in record.items()}
        if "messages" in record:
            return
        left_out = [name for name in left_out if record[name]]
        with path.open("w", newline="") as file:
            lines = csv.DictWriter(file, list(record))
            lines.writeheader()
            lines.writerows([record] * 3)
    elif ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**record, "meta": 0}] * 3), path)
        left_out = [*left_out, "meta"]
    else:
        path.write_text(json.dumps([record] * 3) if ending == "json" else (json.dumps(record) + "\n") * 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(load_texts(str(path))) == 3
    said = [each.message for each in caught if isinstance(each.message, FieldsLeftOut)]
    assert [(each.read, each.left_out) for each in said] == ([(read, left_out)] if left_out else [])


@pytest.mark.parametrize("fields", [{"title": "a", "label": "b"}, {"question_id": "1"}])
def test_a_record_of_another_format_is_refused_with_its_fields(tmp_path, fields):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(fields))
    assert failure(file).endswith(f"it has {', '.join(fields)}")


def test_a_json_file_of_records_is_read_as_records(tmp_path):
    records = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
    file = tmp_path / "x.json"
    for text in (json.dumps(records), json.dumps(records, indent=2), "\ufeff" + json.dumps(records)):
        file.write_text(text)
        assert load_texts(str(file)) == ["a\n\nb", "c\n\nd"]
    file.write_text(json.dumps([{"a": 1}]))
    assert f"{file}, record 0: needs a text field" in failure(file)


@pytest.mark.parametrize("text", ['{\n  "a": {"b": 1}\n}', "[1, 2, 3]", '"a string"'])
def test_json_that_is_no_record_is_a_text(tmp_path, text):
    """Such as a configuration file in a folder of sources."""
    file = tmp_path / "x.json"
    file.write_text(text)
    assert load_texts(str(file)) == [text]


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ('{\n "text": "a",\n "id": 1\n}', ["a"]),
        ('["a", "b"]', ["a", "b"]),
        ('[{"text": "a"}, "b"]', "record 1: expected an object"),
        ('{\n "data": [{"text": "a"}]\n}', "it has data"),
        ('{\n "text": ["a", "b"]\n}', "it has text"),
        ('{"text": "a"}{"text": "b"}', "not valid JSON"),
        ('{"text": "a"},\n{"text": "b"}', "not valid JSON"),
        ('{"text": "a"', "not valid JSON"),
    ],
)
def test_records_in_json_are_read_or_refused_and_never_a_text(tmp_path, text, documents):
    file = tmp_path / "x.json"
    file.write_text(text)
    if isinstance(documents, list):
        assert load_texts(str(file)) == documents
    else:
        assert documents in failure(file)


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("text,text\na,b\n")
    assert "two columns have the same name; it has text, text" in failure(file)


@pytest.mark.parametrize("form", ["new_file", "new_stream"])
def test_both_formats_of_arrow(tmp_path, form):
    pa = pytest.importorskip("pyarrow")
    ipc = pytest.importorskip("pyarrow.ipc")
    table = pa.table({"text": ["a", "b"]})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, getattr(ipc, form)(file, table.schema) as writer:
        writer.write_table(table)
    assert load_texts(str(tmp_path / "x.arrow")) == ["a", "b"]


def test_tables_of_separated_values(tmp_path):
    file = tmp_path / "x.csv"
    file.write_bytes('\ufeffquestion,answer\n"a, and\nmore",b\n'.encode())
    assert load_texts(str(file)) == ["a, and\nmore\n\nb"]
    file.write_text("text\n" + "x" * 200_000)
    assert load_texts(str(file)) == ["x" * 200_000]
    file.write_text("a,b\n1,2\n")
    assert "line 2: needs a text field" in failure(file)
    file.write_text('text\n"open')
    assert "no valid table of separated values" in failure(file)
    file = tmp_path / "x.tsv"
    file.write_text("prompt\tcompletion\na\tb\n")
    assert load_texts(str(file)) == ["a\n\nb"]


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.txt.gz"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, name):
    file = tmp_path / name
    data = "\ufeffHello".encode()
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_text(file) == "Hello"
    assert load_texts(str(file)) == ["Hello"]


def test_half_a_character_is_no_text(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a \\ud83d\\ude00"}\n')
    assert load_texts(str(file)) == ["a 😀"]
    file.write_text('{"text": "fine"}\n{"text": "a \\ud83d"}\n')
    assert failure(file).startswith(f"{file}, line 2 has \\ud83d, half of a character, at position ")
    for encoding in (encode, prompt_ids):
        with pytest.raises(TextError, match=r"a text has .udc00, half of a character, at position 1: correct it"):
            encoding(tiny().tokenizer, "a\udc00")


def test_lines_that_end_as_in_windows_are_lines(tmp_path):
    file = tmp_path / "x.txt"
    file.write_bytes(b"one\r\ntwo\r\n\r\nthree\rfour")
    assert read_text(file) == "one\ntwo\n\nthree\rfour"


def test_a_pipe_is_read_whole_and_a_device_is_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = "some text " * 2000
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    assert load_texts(str(pipe)) == [text]
    writer.join()
    assert failure("/dev/zero") == "/dev/zero is a device: give a text file"


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


def test_for_evaluation_a_split_is_taken_that_calibration_does_not_see(dataset):
    assert load_texts(f"hub:{dataset}", held_out=True) == [f"test {i}" for i in range(3)]
    assert load_texts(f"hub:{dataset}::train", held_out=True)[0] == "train 0"
    (dataset / "test.jsonl").rename(dataset / "validation.jsonl")
    assert load_texts(f"hub:{dataset}", held_out=True)[0] == "test 0"
    (dataset / "validation.jsonl").unlink()
    assert load_texts(f"hub:{dataset}", held_out=True)[0] == "train 0"


def test_a_split_that_is_not_there_is_an_error_that_lists_those_that_are(dataset):
    said = failure(f"hub:{dataset}::nope")
    assert "'train'" in said
    assert "'test'" in said


def test_without_a_network_the_error_says_so_and_what_to_do():
    for source in ("hub:nobody/nothing", "wikitext2", "c4"):
        assert "Couldn't reach" in failure(source)
        assert "check the name and the network, or give a file" in failure(source)


# Rows in files


ROWS = [{"text": "one"}, {"text": "two\u2028lines"}, {"text": ""}, {"text": "three"}]
TEXTS = ["one", "two\u2028lines", "three"]


@pytest.fixture(params=["x.jsonl", "x.jsonl.gz", "c4-validation.00000-of-00008.json.gz", "x.parquet", "x.arrow"])
def rows_file(request, tmp_path):
    """The same rows in every format."""
    import datasets

    path = tmp_path / request.param
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    if path.suffix == ".jsonl":
        path.write_bytes(lines)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
        shutil.move(tmp_path / "saved" / "data-00000-of-00001.arrow", path)
        shutil.rmtree(tmp_path / "saved")
    return path


def test_a_file_of_rows_is_its_documents_alone_and_in_a_folder(rows_file):
    assert load_texts(str(rows_file)) == TEXTS
    (rows_file.parent / "z.txt").write_text("four")
    assert load_texts(str(rows_file.parent)) == [*TEXTS, "four"]


def test_a_damaged_file_of_rows_is_an_error(rows_file):
    rows_file.write_bytes(rows_file.read_bytes()[:-15])
    assert str(rows_file) in failure(rows_file)
    rows_file.write_bytes(b"neither\0 of them")
    assert str(rows_file) in failure(rows_file)


@pytest.fixture
def saved(tmp_path):
    """A data set with splits, as `save_to_disk` leaves it."""
    import datasets

    splits = {
        name: datasets.Dataset.from_list([{"text": f"{name} {i}"} for i in range(2)]) for name in ("train", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_data_set_that_was_saved_to_disk_is_read_as_one(saved):
    for source in (str(saved), f"hub:{saved}"):
        assert load_texts(source) == ["train 0", "train 1"]
        assert load_texts(source, held_out=True) == ["test 0", "test 1"]
    assert load_texts(f"hub:{saved}::test") == ["test 0", "test 1"]
    assert load_texts(str(saved / "test")) == ["test 0", "test 1"], "one split alone"


def test_a_saved_data_set_without_the_split_or_damaged_is_an_error(saved):
    assert failure(f"hub:{saved}::validation") == f"{saved} has no split 'validation': there are train, test"
    assert "has no splits: leave out 'test'" in failure(f"hub:{saved / 'train'}::test")
    (saved / "test" / "state.json").write_text("{")
    assert f"cannot read the data set in {saved}" in failure(saved)


# Texts by name


@pytest.fixture
def hub(monkeypatch):
    """What a hub would give, and what it was asked for."""
    import datasets

    asked = []

    def load_dataset(path, name=None, split=None, data_files=None):
        asked.append((path, name, split, data_files))
        return datasets.Dataset.from_list([{"text": text} for text in load_dataset.texts])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_dataset.asked = asked
    return load_dataset


def test_wikitext2_is_the_rows_of_its_test_split_joined(hub, monkeypatch):
    monkeypatch.setattr(texts, "MAX_ROWS", 2)
    hub.texts = ["", " = Title = \n", "", " A line . \n"]
    assert load_texts("wikitext2", held_out=True) == ["\n\n = Title = \n\n\n\n\n A line . \n"]
    load_texts("wikitext2")
    assert hub.asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None),
    ]
    assert describe_texts("wikitext2", held_out=True) == (
        "wikitext2 (Salesforce/wikitext wikitext-2-raw-v1 test split, rows joined)"
    )
    hub.texts = ["", ""]
    assert "no text in wikitext2" in failure("wikitext2")


def test_c4_is_the_documents_of_one_shard(hub):
    hub.texts = ["one", "two"]
    assert load_texts("c4", held_out=True) == ["one", "two"]
    assert load_texts("c4") == ["one", "two"]
    held_out, training = hub.asked
    assert held_out == ("allenai/c4", None, "validation", {"validation": "en/c4-validation.00000-of-00008.json.gz"})
    assert training == ("allenai/c4", None, "train", {"train": "en/c4-train.00000-of-01024.json.gz"})
    assert "validation split, first shard" in describe_texts("c4", held_out=True)


def test_of_a_large_shard_rows_are_chosen_by_seed(hub, monkeypatch):
    monkeypatch.setattr(named, "MOST", 5)
    hub.texts = [f"document {i}" for i in range(40)]
    first, again, other = (load_texts("c4", held_out=True, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert len(set(first)) == 5
    assert first != other


def test_a_text_by_name_can_come_from_a_file_of_its_rows(rows_file):
    assert load_texts(f"wikitext2:{rows_file}") == ["\n\n".join(row["text"] for row in ROWS)]
    assert load_texts(f"c4:{rows_file}") == TEXTS
    assert describe_texts(f"wikitext2:{rows_file}") == f"wikitext2 ({rows_file}, rows joined)"
    assert "no such file" in failure("wikitext2:nowhere.parquet")


def test_only_a_name_describes_more_than_itself():
    for source in ("builtin", "some/file.txt", "hub:wikitext2"):
        assert describe_texts(source) == source
        assert not is_one_document(source)
    assert is_one_document("wikitext2")
    assert is_one_document("wikitext2:file.txt")
    assert not is_one_document("c4")


# Token ids


@pytest.mark.parametrize("unit", ["x", "word ", "a\u0301 \u65e5\u672c", " " * 40 + "\n"])
def test_the_beginning_of_a_text_has_the_tokens_of_the_whole(unit):
    text = unit * 30_000
    tokenizer = tiny().tokenizer
    whole = encode(tokenizer, text)
    for tokens in (1, 100, len(whole)):
        ids = beginning(tokenizer, text, tokens)
        assert len(ids) >= tokens
        assert ids == whole[: len(ids)]
    assert beginning(tokenizer, text, len(whole) + 1) == whole
