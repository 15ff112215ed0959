"""The picture of what was recalled, beside the samples of a run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from commandline import kvmix, kvmix_json
from evaluating import tiny

from kvmix_cli.errors import OutputError
from kvmix_cli.evaluation.results import Report, Row
from kvmix_cli.models import loading as models
from kvmix_cli.reporting.plots.heat_map import heat_maps

PICTURES = "passkey__builtin--tiny__heatmap__*.png"
OPTIONS = ("--model", "builtin:tiny", "--device", "cpu", "--uniform", 2, "--length", 200, "--limit", 2, "--prefix", 100)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_model", lambda *arguments, **options: tiny())


def record(depth, context, recalled):
    return {"context": context, "answers": [{"depth": depth, "distance": 20, "recalled": recalled}]}


def report(count, contexts=(512, 1024), depths=(0.0, 0.5, 1.0), error=None):
    records = tuple(record(depth, context, depth < 1) for depth in depths for context in contexts)
    rows = [Row("passkey", f"plan {n}", 2, 2.5, records=records) for n in range(count)]
    broken = [Row("passkey", "broken", 2, None, error=error)] if error else []
    return Report("passkey", 1, "", (*rows, *broken))


def panels(figure):
    return [axes for axes in figure.axes if axes.get_title("left")]


@pytest.mark.slow
def test_a_disk_that_is_full_while_drawing_says_that_all_samples_are_saved(monkeypatch):
    def full(*_):
        raise OutputError("cannot write heatmap.png: No space left on device")

    monkeypatch.setattr("kvmix_cli.reporting.plots.heat_map.plot_heat_maps", full)
    result = kvmix("eval", *OPTIONS, "--task", "passkey", "--depths", 2)
    assert result.exit_code == 1
    assert result.stderr.endswith(
        "all samples and rows are saved in results: the same command with --resume writes the rest\n"
    )
    assert len(list(Path("results").glob("*/metrics.json"))) == 2


@pytest.mark.slow
def test_eval_says_where_the_picture_is():
    result = kvmix("eval", *OPTIONS, "--task", "passkey", "--depths", 2)
    assert result.exit_code == 0, result.stderr
    (picture,) = Path("results").glob(PICTURES)
    assert f"picture: {picture}\n" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_other_settings_have_another_picture():
    for length in (200, 240, 200):
        assert kvmix("eval", *OPTIONS, "--task", "passkey", "--length", length).exit_code == 0
    assert len(list(Path("results").glob(PICTURES))) == 2


@pytest.mark.slow
def test_with_json_it_is_drawn_and_not_mentioned():
    kvmix_json("eval", *OPTIONS, "--task", "passkey", "--depths", 2)
    assert len(list(Path("results").glob(PICTURES))) == 1


@pytest.mark.slow
def test_a_task_without_places_has_no_picture():
    assert "picture" not in kvmix("eval", *OPTIONS, "--task", "perplexity").stdout
    assert not list(Path().rglob("*.png"))


def test_each_row_has_a_panel_that_names_it_and_counts():
    (first, second) = panels(heat_maps(report(2)))
    assert first.get_title("left") == "plan 0\n2.5 bits stored, 4 of 6 recalled"
    assert second.get_title("left").startswith("plan 1")
    assert [label.get_text() for label in first.get_xticklabels()] == ["512", "1024"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["0%", "50%", "100%"]
    assert [text.get_text() for text in first.texts] == ["1/1"] * 4 + ["0/1"] * 2
    assert first.collections[0].get_clim() == (0, 1), "the same colours for the same share in every picture"


def test_a_row_that_could_not_be_measured_has_none():
    assert len(panels(heat_maps(report(1, error="out of memory")))) == 1
    assert heat_maps(report(0, error="out of memory")) is None


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4, 5, 9])
def test_any_number_of_rows_has_room(count):
    figure = heat_maps(report(count))
    assert len(panels(figure)) == count
    figure.draw_without_rendering()
    spots = [axes.get_position() for axes in panels(figure)]
    assert all(0 < spot.x0 < spot.x1 < 1 and 0 < spot.y0 < spot.y1 < 1 for spot in spots)


def test_cells_too_small_for_their_counts_have_none():
    (axes,) = panels(heat_maps(report(1, contexts=range(100, 190))))
    assert not axes.texts


def test_a_hundred_values_in_a_cell_are_a_percentage():
    records = tuple(record(0.5, 512, n < 125) for n in range(250))
    rows = (Row("passkey", "plan", 2, None, records=records),)
    (axes,) = panels(heat_maps(SimpleNamespace(task="passkey", rows=rows)))
    assert [text.get_text() for text in axes.texts] == ["50%"]
    assert axes.get_title("left") == "plan\n125 of 250 recalled"
