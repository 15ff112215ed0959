"""docs/quickstart.ipynb, executed: every cell runs, and prints what is stored beside it."""

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"


def printed(cell):
    return "".join(output["text"] for output in cell.get("outputs", ()) if output.get("name") == "stdout")


@pytest.mark.slow
def test_the_notebook_runs_and_prints_what_it_shows(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    stored, cells = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    folder = tmp_path / "empty"
    folder.mkdir()
    nbclient.NotebookClient(cells, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    shown = [(printed(before), printed(after)) for before, after in zip(stored.cells, cells.cells, strict=True)]
    assert any(before for before, _ in shown)
    assert all(before in ("", after) for before, after in shown), "what is stored is what comes out"

    text = "\n".join(after for _, after in shown)
    assert float(re.search(r"([\d.]+) stored bits", text)[1]) <= 3
    packed, plain = map(float, re.search(r"tokens in ([\d.]+) MiB instead of ([\d.]+)", text).groups())
    assert packed < plain / 2
    rows = dict(re.findall(r"^(.+): perplexity [\d.]+ .*, (\d+)% read quantized$", text, re.MULTILINE))
    assert list(rows) == ["unquantized", "planned", "2 bits everywhere"]
    assert rows["unquantized"] == "0"
    assert int(rows["planned"]) == int(rows["2 bits everywhere"]) > 50
    assert (folder / "plan.yaml").is_file()
