"""Results on stdout, everything else on stderr; JSON that is JSON."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kvmix_cli import console
from kvmix_cli.errors import KvmixError, OutputError


def as_json(capsys, value):
    console.mode.json = True
    console.emit_json(value)
    return json.loads(capsys.readouterr().out)


def test_numbers_stay_numbers(capsys):
    value = {"a": np.float32(0.5), "b": torch.tensor(3), "c": Path("x/y"), "d": [1, 2.5, None, True, "ü"]}
    assert as_json(capsys, value) == {"a": 0.5, "b": 3, "c": "x/y", "d": [1, 2.5, None, True, "ü"]}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float64("nan"), torch.tensor(float("-inf"))])
def test_nan_is_an_error_and_nothing_is_printed(capsys, number):
    console.mode.json = True
    with pytest.raises(KvmixError, match="NaN or infinite"):
        console.emit_json({"rows": [{"value": number}]})
    assert capsys.readouterr().out == ""


def test_json_silences_tables_and_text_and_only_then_speaks(capsys):
    def everything():
        console.text("text")
        console.table("title", ["a"], [[1]], "footer")
        console.emit_json({"a": 1})
        return capsys.readouterr().out

    assert '{"a": 1}' not in everything()
    console.mode.json = True
    assert everything() == '{"a": 1}\n'


def test_tables_are_plain_text_with_numbers_to_the_right(capsys):
    console.table("a [bold]title[/bold]", ["name", "value"], [["[red]x", 1], ["long name", 22.5]], "below")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a [bold]title[/bold]"
    assert lines[2].split() == ["name", "value"]
    assert lines[4] == "[red]x          1"
    assert lines[5] == "long name    22.5"
    assert lines[-1] == "below"
    assert all(line == line.rstrip() for line in lines)


def test_an_empty_table(capsys):
    console.table("nothing", ["a", "b"], [])
    assert capsys.readouterr().out.startswith("nothing\n")


ESTIMATES = ["28.72 [12.29, 67.12]", "+0.0036 [-0.0002, +0.0074]", "+0.36 % [-0.02 %, +0.74 %] *"]


def in_columns(monkeypatch, capsys, columns, rows, width):
    monkeypatch.setattr(console, "width", lambda: width)
    console.table("title", columns, rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width, lines
    return lines


@pytest.mark.parametrize("columns", ["0", "1", "7"])
def test_no_terminal_is_so_narrow_that_cells_are_lost(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(console.sys.stdout, "isatty", lambda: True)
    console.table("bits", ["layer", "K"], [["0-7", "2.19"]])
    lines = capsys.readouterr().out.splitlines()
    assert any("0-7" in line and "2.19" in line for line in lines), lines


@pytest.mark.parametrize("width", [50, 60, 80, 100])
@pytest.mark.parametrize("count", [1, 2, 12])
def test_no_number_is_wrapped_in_a_narrow_terminal(monkeypatch, capsys, width, count):
    columns = ["plan", "nominal", "stored", "perplexity", "loss increase", "perplexity increase percent"]
    names = [f"rank-2.3+mikv-{index}" for index in range(count)]
    lines = in_columns(monkeypatch, capsys, columns, [[name, "2.19", "2.69", *ESTIMATES] for name in names], width)
    for cell in (*ESTIMATES[:2], ESTIMATES[2], *names):
        assert any(cell in line for line in lines), (cell, lines)


def test_a_wide_table_is_turned_where_that_fits_and_else_broken_between_columns(monkeypatch, capsys):
    columns = ["layer", *(f"K {bits} (group 64)" for bits in (1, 2, 3, 4, 8))]
    turned = in_columns(monkeypatch, capsys, columns, [[0, *[0.1] * 5]], 60)
    assert [line.split()[0] for line in turned[2:] if line] == ["layer", turned[3], "K", "K", "K", "K", "K"]
    broken = in_columns(monkeypatch, capsys, columns, [[layer, *[0.123456789] * 5] for layer in range(32)], 60)
    assert sum(line.startswith("layer") for line in broken) == 2
    assert sum(line.split()[:2] == ["31", "0.123456789"] for line in broken) == 2


def test_only_a_name_of_more_than_half_the_line_is_wrapped(monkeypatch, capsys):
    name = "a-very-long-name-of-a-plan" * 3
    lines = in_columns(monkeypatch, capsys, ["plan", "perplexity"], [[name, ESTIMATES[0]]] * 4, 60)
    assert sum(ESTIMATES[0] in line for line in lines) == 4
    assert "".join(line.split()[0] for line in lines[4:] if line).count(name) == 4


def test_a_path_is_not_cut_when_stdout_is_no_terminal(capsys):
    path = "/".join(["folder"] * 20)
    console.table("t", ["path"], [[path]])
    assert path in capsys.readouterr().out


def test_quiet_hides_notices_and_nothing_else(capsys):
    console.mode.quiet = True
    console.notice("notice")
    console.alert("alert")
    console.fail(KvmixError("failed"))
    assert capsys.readouterr().err == "kvmix: alert\nkvmix: error: failed\n"


def test_one_line_whatever_a_message_quotes(capsys):
    console.notice("a\nb\r\n\tc\x1b[2J\x07d")
    assert capsys.readouterr().err == "kvmix: a b c?[2J?d\n"


def test_text_of_files_and_models_cannot_move_the_cursor(capsys):
    console.text("a\x1b]0;title\x07b\tc\r\nd\re\x9b1A\n")
    console.table("t\x1b[2J", ["\x08a"], [["\x1b[31mred"], ["ok"]], "foot\x1b[0m\nline")
    out = capsys.readouterr().out
    assert not set(out) & {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))}
    assert out.startswith("a?]0;title?b\tc\nd?e?1A\n")
    assert "?[31mred" in out
    assert "foot?[0m\nline" in out


def test_json_holds_no_control_characters_either(capsys):
    console.mode.json = True
    console.emit_json({"text": "a\x1bb\x9bc\x7f\ud800"})
    out = capsys.readouterr().out
    assert out.isprintable() or not set(out[:-1]) & {"\x1b", "\x9b", "\x7f"}
    assert json.loads(out) == {"text": "a\x1bb\x9bc\x7f?"}


def test_there_is_one_object_even_if_an_error_follows(capsys):
    console.mode.json = True
    console.emit_json({"a": 1})
    console.fail(KvmixError("late"), "run")
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_no_bar_without_a_terminal(capsys):
    with console.progress("work", 3) as bar:
        bar()
        bar(2)
    assert bar.done == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("quiet", [True, False])
def test_a_bar_on_a_terminal_unless_quiet(monkeypatch, quiet):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    console.mode.quiet = quiet
    with console.progress("work", 4) as bar:
        bar.reach(3)
    shown = console.sys.stderr.getvalue()
    assert ("work" in shown, "3/4" in shown) == (not quiet, not quiet)
    assert "-:--:--" not in shown
    assert (", none done yet" in shown) == (not quiet)


def test_a_bar_always_says_a_time(monkeypatch):
    """The time so far while nothing, or only one step, is done: no rate is known then. Later the time left."""
    clock = [0.0]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("rich.console.monotonic", lambda: clock[0])
    found = []
    with console.progress("work", 4) as bar:
        for step in range(4):
            clock[0] += 90.0
            if step:
                bar()
            bar._progress.refresh()
            found.append(console.sys.stderr.getvalue())
            clock[0] += 1.0
    shown = [after.removeprefix(before) for before, after in zip(["", *found], found, strict=False)]
    assert "1:30, none done yet" in shown[0]
    assert " so far" in shown[1]
    assert " left" in shown[2]
    assert " left" in shown[3]
    assert not any("-:--:--" in each or "none done" in each for each in shown[1:])


def test_a_terminal_that_knows_no_unicode(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    console.table("t", ["a", "b"], [[1, 2]])
    assert not console.is_unicode()
    assert "=" in stream.buffer.getvalue().decode("ascii")


def test_a_full_disk(monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(OutputError, match="No space left on device"):
        console.text("x")
