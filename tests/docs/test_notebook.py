"""docs/quickstart.ipynb, executed: every cell runs, and prints what is stored beside it."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"
NUMBER = re.compile(r"\d+\.\d+")
"""Scores and perplexities, whose last digits are the processor's; words, bits and counts are to be the same."""


def numbers(text):
    return [float(number) for number in NUMBER.findall(text)]


def stored_text(cell):
    """What is stored as printed; a cell shows nothing else."""
    assert all((output["output_type"], output["name"]) == ("stream", "stdout") for output in cell["outputs"])
    return "".join(line for output in cell["outputs"] for line in output["text"])


def run(cells):
    """Execute cells one after another, as a kernel does, and return what each prints."""
    names, texts = {"__name__": "__main__"}, []
    for number, cell in enumerate(cells):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), names)
        texts.append(printed.getvalue())
    return texts


@pytest.mark.slow
def test_the_notebook_runs_and_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    stored, printed = [stored_text(cell) for cell in cells], run(cells)
    for before, after in zip(stored, printed, strict=True):
        assert NUMBER.sub("#", before) == NUMBER.sub("#", after)
        assert numbers(before) == pytest.approx(numbers(after), rel=0.05, abs=2e-5)

    text = "\n".join(printed)
    assert float(re.search(r"([\d.]+) stored bits", text)[1]) <= 2.35
    packed, plain = map(float, re.search(r"tokens in ([\d.]+) MiB instead of ([\d.]+)", text).groups())
    assert packed < plain / 2
    rows = dict(re.findall(r"^(.+): perplexity [\d.]+ .*, (\d+)% read quantized$", text, re.MULTILINE))
    assert list(rows) == ["unquantized", "planned", "2 bits everywhere"]
    assert rows["unquantized"] == "0"
    assert min(int(rows["planned"]), int(rows["2 bits everywhere"])) > 50
    planned, uniform = map(float, re.findall(r"([\d.]+) nats from", text))
    assert planned < uniform / 20
    assert (tmp_path / "quickstart" / "plan.yaml").is_file()
