"""YAML is data: bombs, tags and duplicates are refused, quickly and in one line."""

import math
import os
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvmix_cli.errors import DocumentError
from kvmix_cli.plan.document import strict_yaml as document
from kvmix_cli.plan.document.strict_yaml import flow, parse_yaml, read_yaml


def fault(text):
    with pytest.raises(DocumentError) as error:
        parse_yaml(text, "file.yaml")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_line_names_some_of_many_faults_and_counts_the_rest():
    error = DocumentError("file.yaml", [f"line {number}: unknown" for number in range(1, 1001)])
    assert str(error).endswith("line 20: unknown; and 980 more")
    assert len(error.faults) == 1000
    assert str(DocumentError("file.yaml", error.faults[:20])).endswith("line 20: unknown")


BOMB = "a: &a [x, x]\n" + "\n".join(
    f"{new}: &{new} [*{old}, *{old}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "line 1: anchors are not allowed (&a); line 2: anchors are not allowed (&b); line 2: aliases are not"),
        ("a: 1\nb: !!python/object/apply:os.system [id]", "line 2: tags are not allowed (tag:yaml.org,2002:python/"),
        ("a: !!str 3", "line 1: tags are not allowed"),
        ("a: !mine 3", "line 1: tags are not allowed (!mine)"),
        ("a: 1\n<<: {b: 2}", "not valid YAML"),
        ("a: 1\nb: 2\na: 3", "line 3: 'a' is given twice"),
        ("a: {b: 1, b: 2}", "line 1: 'b' is given twice"),
        ("a: 1\n---\nb: 2", "not valid YAML: but found another document"),
        ("? [1]\n: 2", "line 1: not valid YAML: a key must be a plain value"),
        ("a: [1", "not valid YAML"),
        ("a: 1\n\tb: 2", "line 2: not valid YAML"),
        ("a: \0", "not valid YAML: unacceptable character"),
        ("[" * 100_000, "line 1: nested deeper than 16"),
        ("- " * 100_000, "line 1: nested deeper than 16"),
        ("a: " + "9" * 5000, "line 1: not valid YAML: a number has more than 100 digits"),
        ("a: 0x" + "f" * 90, "line 1: not valid YAML: a number has more than 64 bits"),
        ("18446744073709551616: a", "line 1: not valid YAML: a number has more than 64 bits"),
        (
            "a: 1\nb: " + "x" * (document.MAX_SCALAR + 1),
            "line 2: a value of 262145 characters; at most 262144 are allowed",
        ),
        ("a: 2020-13-45", "not valid YAML: month must be in 1..12"),
    ],
    ids=range(19),
)
def test_refused(text, expected):
    assert fault(text).startswith("file.yaml: ")
    assert expected in fault(text)


def test_lines_are_those_of_the_keys():
    document = parse_yaml("# comment\na:\n  b:\n    - 1\n    - {c: 2}\n", "x")
    assert document.data == {"a": {"b": [1, {"c": 2}]}}
    assert [document.line(at) for at in [("a",), ("a", "b"), ("a", "b", 1, "c"), ("a", "gone"), ()]] == [2, 3, 5, 2, 2]


def test_without_libyaml_the_rules_are_the_same(monkeypatch):
    monkeypatch.setattr(document, "_Loader", document.strict_loader(document.yaml.SafeLoader))
    for text in (BOMB, "a: !!str 3", "a: 1\na: 2", "? [1]\n: 2", "[" * 1000, "a: \0"):
        fault(text)
    assert parse_yaml("a: [1, 2.5, x]", "x").data == {"a": [1, 2.5, "x"]}


@pytest.mark.parametrize("base", ["SafeLoader", "CSafeLoader"])
def test_numbers_are_those_of_yaml_1_2(monkeypatch, base):
    """`1:30` was ninety in YAML 1.1, and took quadratic time to read."""
    monkeypatch.setattr(document, "_Loader", document.strict_loader(getattr(document.yaml, base)))
    text = "[1:30, 1:30.5, 12, -0x1f, 0b11, 010, 1_000, 1.5e+3, -.inf, 1., .5]"
    assert parse_yaml(text, "x").data == ["1:30", "1:30.5", 12, -31, 3, 8, 1000, 1500.0, -math.inf, 1.0, 0.5]


@pytest.mark.parametrize("text", ["a: 1" + ":1" * 130_000, "a: 1" + ":1" * 130_000 + ".5"])
def test_the_longest_value_takes_no_time(text):
    """The first took 4 s when it was read as a number to base 60, the second ended in an OverflowError."""
    started = time.process_time()
    assert parse_yaml(text, "x").data == {"a": text.removeprefix("a: ")}
    assert time.process_time() - started < 1, "a generous bound: it takes a few milliseconds"


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda path: None, "cannot be read: No such file or directory"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b"a: \xff"), "cannot be read: it is not UTF-8 text"),
        (lambda path: path.write_bytes(b"#" * (document.MAX_BYTES + 1)), "larger than 4 MiB"),
        (lambda path: path.symlink_to("/dev/zero"), "larger than 4 MiB"),
    ],
)
def test_unreadable_files(tmp_path, prepare, expected):
    path = tmp_path / "file.yaml"
    prepare(path)
    with pytest.raises(DocumentError, match=expected):
        read_yaml(path)


@pytest.mark.skipif(os.name == "nt", reason="a byte order mark is left to the platform")
def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path).data == {"a": 1}


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["yes", "a: \n😀"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=150), inner, max_size=3),
    max_leaves=6,
)


@given(plain)
def test_what_is_written_does_not_depend_on_how_pyyaml_was_built(value):
    with_pyyaml = yaml.dump(
        value, Dumper=document._OneLineDumper, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True
    )
    assert flow(value) == with_pyyaml.removesuffix("\n").removesuffix("\n...")
