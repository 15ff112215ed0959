import csv
import json
import re
import shutil
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import forking
import pytest
from commandline import kvmix, kvmix_json, refused
from evaluating import INFO, run_folder, uniform
from hypothesis import given
from hypothesis import strategies as some
from markupsafe import Markup
from reporting import FOUR, PERPLEXITY, TWO, Scripted, measured, memory, perplexity, recall, throughput

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError
from kvmix_cli.evaluation.base import Settings
from kvmix_cli.evaluation.results import Metric
from kvmix_cli.reporting.comparison import front
from kvmix_cli.reporting.page import figures
from kvmix_cli.reporting.plan_names import names_text

HOSTILE = "<script>alert(1)</script>\"'&|`</title>"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page as a browser would take it: its elements, the text of each, and whether every one is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text, self.tables = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr" and "tbody" in self.open:
            self.tables[-1].append([])
        if tag == "tbody":
            self.tables.append([])
        if tag in ("th", "td") and "tbody" in self.open:
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data
        if self.tables and self.open and {"th", "td", "small"} & {self.open[-1]} and "tbody" in self.open:
            self.tables[-1][-1][-1] += data if self.open[-1] != "small" else f" {data}"

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def page(path="results/report.html"):
    return Page(Path(path).read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def four_tasks(tmp_path_factory):
    """The run folders of four tasks of one model; tests must not write to them."""
    folder = tmp_path_factory.mktemp("measured") / "results"
    for task in (perplexity(), recall(), memory(), throughput()):
        measured(folder, task)
    return folder


@pytest.fixture
def results(four_tasks):
    """The same, to be written to."""
    shutil.copytree(four_tasks, "results")


@pytest.mark.usefixtures("results")
def test_two_outputs_in_one_file_are_refused():
    result = kvmix("report", "results", "--csv", "numbers", "--markdown", "./numbers")
    assert "two outputs would be numbers: give each of them a name of its own" in refused(result)
    assert not Path("numbers").exists()


@pytest.fixture
def undrawn(monkeypatch):
    """Pages with empty figures: to draw them takes most of a report's time."""
    monkeypatch.setattr(figures, "_drawn", lambda axes, label: Markup("<svg></svg>"))


@dataclass(frozen=True)
class Reported:
    """What a report without arguments but its files printed and wrote."""

    stdout: str
    stderr: str
    html: str
    page: Page
    markdown: str
    csv: str


@pytest.fixture(scope="module")
def reported(four_tasks, tmp_path_factory):
    """The report of four tasks of one model."""
    folder = tmp_path_factory.mktemp("reported")
    shutil.copytree(four_tasks, folder / "results")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = kvmix("report", "--markdown", "report.md", "--csv", "out/numbers.csv")
    assert result.exit_code == 0, result.stderr
    html, markdown, csv = (folder / name for name in ("results/report.html", "report.md", "out/numbers.csv"))
    html_text = html.read_text(encoding="utf-8")
    return Reported(result.stdout, result.stderr, html_text, Page(html_text), markdown.read_text(), csv.read_text())


@pytest.mark.slow
def test_without_arguments_it_reads_results_and_writes_the_page_there(reported):
    assert "wrote results/report.html" in reported.stderr
    for word in ("perplexity", "recall", "measured bytes", "10.3 [8.2, 12.4]", "3 MiB", "80.0%", "2 samples of 1024"):
        assert word in reported.stdout
    assert reported.page.text.count("builtin:tiny") > 1


def test_the_table_has_the_unquantized_cache_first_and_then_plans_by_stored_bits(reported):
    overview = reported.page.tables[0]
    assert [row[0] for row in overview] == ["unquantized", "two", "four"]
    assert overview[1][1:6] == ["2.00", "4.00", "80.0%", "10.3 [8.2, 12.4]", "+3.00 [+2.00, +4.00]"]


@pytest.mark.slow
def test_what_is_best_for_its_bits_is_marked_and_what_read_nothing_quantized_is_not():
    idle = Subject("idle", uniform(1, info=INFO))
    task = perplexity()
    measure = task.measure

    def without_quantized(loaded, subject, sample, settings):
        record = measure(loaded, subject, sample, settings)
        return {**record, "attended": {"total": 100, "quantized": 0}} if subject is idle else record

    task.measure = without_quantized
    worse = Subject("worse", uniform(8, info=INFO))
    measured(Path("results"), task, [TWO, FOUR, idle, worse])
    rows = kvmix_json("report")["groups"][0]["measurements"][0]["rows"]
    assert {row["plan"]: row["best_for_its_bits"] for row in rows} == {
        "unquantized": False,
        "idle": False,
        "two": True,
        "four": True,
        "worse": False,
    }
    shown = kvmix("report")
    assert shown.stdout.count(" *\n") == 2
    assert (
        "* by its value: of the plans with as few stored bits, none has a better one; brackets are 95 %" in shown.stdout
    )
    assert "warning: perplexity: idle: NOTHING QUANTIZED WAS READ" in shown.stderr
    assert "NOTHING QUANTIZED WAS READ" in page().text


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_json_has_everything_that_was_measured(results):
    data = kvmix_json("report", "results")
    assert (data["command"], data["html"]) == ("report", "results/report.html")
    (group,) = data["groups"]
    assert (group["model"], group["dtype"], group["device"]) == ("builtin:tiny", "float32", "cpu")
    assert [each["task"] for each in group["measurements"]] == ["perplexity", "recall", "memory", "throughput"]
    row = group["measurements"][0]["rows"][1]
    assert (row["plan"], row["metrics"]["perplexity"]["value"], row["stored_bits"]) == ("two", 10.3, 4.0)
    assert (data["unfinished"], data["faults"], data["notes"]) == ([], [], [])


def test_csv_has_a_line_for_every_number(reported):
    rows = list(csv.DictReader(reported.csv.splitlines()))
    assert len(rows) == 3 + 2 + 3 + 3 + 3 * 2
    (row,) = (row for row in rows if row["plan"] == "two" and row["metric"] == "perplexity_increase_percent")
    assert [float(row[name]) for name in ("value", "low", "high", "stored_bits", "quantized_share")] == [
        3,
        2,
        4,
        4,
        0.8,
    ]
    assert (row["model"], row["task"], row["unit"]) == ("builtin:tiny", "perplexity", "%")


def test_markdown_has_one_table_a_group(reported):
    lines = reported.markdown.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 3
    assert len({line.count("|") for line in table}) == 1
    assert lines[0] == "<!-- kvmix report --markdown report.md --csv out/numbers.csv -->"


def test_every_plot_is_there_if_there_is_something_in_it(reported):
    found = reported.page
    labels = [
        attributes["aria-label"] for tag, attributes in found.elements if tag == "svg" and attributes["aria-label"]
    ]
    assert labels == [
        "perplexity increase against stored bits",
        "perplexity increase against cache in MiB",
        "recall against stored bits",
        "bits by layer of two: 0-7:k2v2",
        "bits by layer of four: 0-7:k4v4",
        "recall of unquantized by depth and distance (tokens)",
        "recall of two by depth and distance (tokens)",
        "recall of four by depth and distance (tokens)",
        "tokens a second by context: decoding, batch 1",
        "tokens a second by context: decoding, batch 8",
        "tokens a second by context: prompt, batch 1",
        "tokens a second by context: prompt, batch 8",
    ]
    for text in (
        "6 of 12 recalled",
        "two at 512 tokens\n64 tokens a second",
        "two\nperplexity increase in % +3.00 [+2.00, +4.00]\nstored bits 4",
        "the best for every size",
    ):
        assert text in found.text or text in reported.html


@pytest.mark.slow
def test_ticks_of_an_increase_have_a_sign_and_are_written_out():
    ruined = {"perplexity": 1927.0, "perplexity_increase_percent": (19898.8, 13211.0, 27412.0)}
    numbers = {
        "unquantized": {"perplexity": 9.6},
        "four": {"perplexity": 9.7, "perplexity_increase_percent": -0.5},
        "two": ruined,
    }
    measured(Path("results"), perplexity(numbers))
    kvmix("report")
    text = Path("results/report.html").read_text()
    assert ">+10,000<" in text
    assert ">0<" in text
    assert "e+" not in page().text


@pytest.mark.slow
def test_a_plot_without_data_is_not_there():
    measured(Path("results"), memory())
    kvmix("report")
    assert "Quality against" not in page().text
    assert "recalled" not in page().text.replace("nothing recalled", "")
    assert "Bits by layer" in page().text


@pytest.mark.slow
def test_one_context_is_drawn_as_bars_and_a_search_for_the_largest_batch_has_a_panel_of_its_own():
    task = throughput(contexts=(512,), batches=(1, 4))
    record = task.record
    task.record = lambda subject, index: {**record(subject, index), **({"largest": True} if index else {})}
    measured(Path("results"), task)
    assert kvmix("report").exit_code == 0
    assert "decoding, at each cache's largest batch" in page().text
    labels = [attributes.get("aria-label", "") for tag, attributes in page().elements if tag == "svg"]
    assert "tokens a second: decoding, batch 1" in labels


def test_the_page_asks_nothing_of_the_network_and_every_element_is_closed(reported):
    text, found = reported.html, reported.page
    for word in ("http:", "https:", "//cdn", "@import", "src="):
        assert word not in text
    references = [attributes["href"] for _, attributes in found.elements if "href" in attributes]
    references += re.findall(r"url\(([^)]*)\)", text)
    assert references and all(reference.startswith("#") for reference in references)
    assert found.count("script") == found.count("style") == 1
    assert text.startswith("<!doctype html>")
    policy = next(attributes for tag, attributes in found.elements if attributes.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none'")


@pytest.mark.slow
def test_whatever_comes_from_files_is_text_and_never_markup():
    info = INFO.model_copy(update={"id": f"org/{HOSTILE}"})
    plan = Subject(HOSTILE, uniform(2, info=info))
    failing = Subject(f"failing {HOSTILE}", uniform(4, info=info))

    def record(subject, index):
        if subject is failing:
            raise EvaluationError(f"no memory {HOSTILE}")
        return {"context": 64, "answers": [{"depth": 0.5, "distance": 3, "recalled": True}]}

    task = Scripted(
        "perplexity",
        (*PERPLEXITY, Metric(HOSTILE, True, HOSTILE)),
        lambda name: {"perplexity": 1.0, HOSTILE: 2.0},
        record,
    )
    task.describe = lambda samples, settings: f"described {HOSTILE}"
    measured(Path("results"), task, [plan, failing], command=f"kvmix eval {HOSTILE}", info=info)
    result = kvmix("report", "--markdown", "report.md", "--csv", "report.csv", "--metric", HOSTILE)
    assert result.exit_code == 0, result.stderr
    found = page()
    assert found.count("script") == 1
    assert found.text.count(HOSTILE) > 8
    assert all(
        HOSTILE in value or "<" not in value for _, attributes in found.elements for value in attributes.values()
    )
    comment, *lines = Path("report.md").read_text().splitlines()
    assert comment.startswith("<!-- kvmix report") and comment.index("-->") == len(comment) - 3
    assert not any("<script" in line for line in lines)
    tables = [line.replace("\\|", "") for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 1
    with Path("report.csv").open(newline="") as file:
        assert HOSTILE in {row["plan"] for row in csv.DictReader(file)}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_plans_that_were_measured_under_a_checksum_have_their_names():
    plan = uniform(2, info=INFO)
    name = plan.sha256[:12]
    measured(Path("results"), perplexity(), [FOUR, Subject(name, plan)])
    assert [row[0] for row in _overview()] == ["unquantized", f"0-7:k2v2 ({name})", "four"]
    Path("results/leaderboard.json").write_text(names_text({name: ["ilp at 4", "uniform at 4"]}))
    assert [row[0] for row in _overview()] == ["unquantized", "ilp at 4, uniform at 4", "four"]
    for damaged in ("{", "[1]", '{"a": 1}', "[" * 100_000):
        Path("results/leaderboard.json").write_text(damaged)
        assert [row[0] for row in _overview()][1] == f"0-7:k2v2 ({name})"


def _overview():
    assert kvmix("report").exit_code == 0
    return page().tables[0]


CONTROL = "\x1b]0;owned\x07\x9b31m\u202e\x7f"


@pytest.mark.slow
def test_control_characters_from_files_reach_no_output():
    info = INFO.model_copy(update={"id": f"org/{CONTROL}"})
    task = perplexity()
    task.describe = lambda samples, settings: f"described {CONTROL}"
    measured(Path("results"), task, [Subject(f"plan {CONTROL}", uniform(2, info=info)), FOUR], info=info)
    result = kvmix("report", "--markdown", "report.md", "--csv", "report.csv")
    assert result.exit_code == 0, result.stderr
    texts = [result.stdout, result.stderr, *(Path(f"report.{end}").read_text() for end in ("md", "csv"))]
    texts.append(Path("results/report.html").read_text())
    for text in texts:
        assert not set(CONTROL) & set(text) - set("owned1m0;]3")
    for drawn in re.findall(r"<svg.*?</svg>", texts[-1], re.DOTALL):
        ElementTree.fromstring(drawn)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_first_line_is_the_answer_everywhere(reported, results):
    (first, second, third) = (reported.stdout, reported.markdown, reported.page.text)
    said = "four at 6 stored bits: +0.50 % perplexity [+0.10, +0.90], recall 12 of 12 against 12: cannot tell"
    assert first.startswith(said)
    assert second.splitlines()[2].startswith("- four at 6 stored bits: +0.50 % perplexity")
    assert third.index(said) < third.index("worse in perplexity and recall") < third.index("Overview")
    assert kvmix_json("report")["answers"][0] == first.splitlines()[0]


@pytest.mark.slow
def test_every_one_of_many_plans_is_named_in_a_figure():
    plans = [Subject(f"plan {index}", uniform(2, info=INFO)) for index in range(20)]
    measured(Path("results"), perplexity(), plans)
    assert kvmix("report").exit_code == 0
    drawn = re.findall(r"<svg.*?</svg>", Path("results/report.html").read_text(), re.DOTALL)
    (rows,) = (text for text in drawn if "of every plan" in text)
    assert {f"plan {index}" for index in range(20)} <= set(ElementTree.fromstring(rows).itertext())


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_names_that_are_no_text_are_shown_as_far_as_they_can_be():
    measured(Path("results"), perplexity())
    folder = run_folder("results", "two")
    other = folder.with_name(f"{folder.name}\udcff")
    try:
        folder.rename(other)
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system has no such names")
    (other / "metrics.json").write_text("{")
    assert kvmix("report", "--html", "report.html", "--csv", "report.csv").exit_code == 0
    assert f"{folder.name}?" in page("report.html").text


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_other_settings_and_other_models_stand_apart():
    measured(Path("one"), perplexity())
    measured(Path("two"), perplexity(), settings=Settings(length=2048))
    measured(Path("three"), perplexity(), dtype="bfloat16")
    measured(Path("four"), perplexity(), info=INFO.model_copy(update={"id": "org/other"}))
    result = kvmix("report", "one", "two", "three", "four")
    titles = [line for line in result.stdout.splitlines() if " of " in line and line.startswith("perplexity")]
    assert titles[0] == "perplexity of builtin:tiny (bfloat16)"
    for length in (1024, 2048):
        assert f"perplexity (length {length}) of builtin:tiny (float32)" in result.stdout
    assert "perplexity of org/other" in result.stdout
    assert "3 parts, across which nothing is compared" in page("one/report.html").text


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_what_is_unfinished_damaged_or_failed_is_said():
    def record(subject, index):
        if subject is FOUR:
            raise EvaluationError("no memory is left")
        if subject is TWO:
            raise KeyboardInterrupt
        return {}

    task = perplexity()
    task.record = record
    with pytest.raises(KeyboardInterrupt):
        measured(Path("results"), task)
    measured(Path("results"), recall())
    damaged = run_folder("results", "four", "recall") / "config.yaml"
    damaged.write_text("{")
    result = kvmix("report", "-q")
    assert result.exit_code == 0
    assert "warning: perplexity: four could not be measured: no memory is left" in result.stderr
    assert f"warning: {damaged}: line 2: not valid YAML" in result.stderr
    assert "0 of 2" in result.stdout.partition("unfinished")[2]
    text = page().text
    for said in ("no memory is left", "not valid YAML", "perplexity of builtin:tiny, two: 0 of 2 samples", "failed"):
        assert said in text
    assert "wrote" not in result.stderr


@pytest.mark.slow
def test_what_failed_half_way_has_no_heat_map():
    task = recall()
    usual = task.record

    def record(subject, index):
        if subject is TWO and index == 1:
            raise EvaluationError("no memory is left")
        return usual(subject, index)

    task.record = record
    measured(Path("results"), task)
    assert kvmix("report").exit_code == 0
    found = [attributes.get("aria-label", "") for tag, attributes in page().elements if tag == "svg"]
    assert [label for label in found if label.startswith("recall of")] == [
        "recall of unquantized by depth and distance (tokens)",
        "recall of four by depth and distance (tokens)",
    ]


def test_runs_that_are_all_unfinished_are_listed():
    task = perplexity()

    def stop(subject, index):
        raise KeyboardInterrupt

    task.record = stop
    with pytest.raises(KeyboardInterrupt):
        measured(Path("results"), task)
    assert kvmix_json("report")["unfinished"][0]["samples"] == 2
    assert "no run is complete" in page().text
    assert "no metric 'perplexity'; no run is complete" in refused(kvmix("report", "--metric", "perplexity"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("nominal_bits", -1), ("stored_bits", -2.5), ("quantized_share", 1.5)])
@pytest.mark.usefixtures("undrawn")
def test_impossible_bits_are_a_damaged_folder_and_cost_none_of_the_others(results, name, value):
    path = run_folder("results", "two") / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    result = kvmix("report")
    assert result.exit_code == 0
    assert f"{path}: damaged ({name}" in result.stderr
    assert [row[0] for row in page().tables[0]] == ["unquantized", "two", "four"]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_context_of_no_tokens_costs_a_curve_and_not_the_report(results):
    path = run_folder("results", "two", "throughput") / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{json.dumps({**line, 'context': 0})}\n" for line in lines))
    assert kvmix("report").exit_code == 0
    assert f"{path.parent.name}: its samples are not what throughput writes" in page().text


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_samples_that_are_not_of_the_task_cost_a_plot_and_not_the_report(results):
    path = run_folder("results", "two", "recall") / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["answers"] = [{"depth": "deep"}]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert kvmix("report").exit_code == 0
    assert f"{path.parent.name}: its samples are not what recall writes" in page().text
    assert "12 of 12 recalled" in page().text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "nowhere does not exist"),
        (("empty",), "no runs in empty"),
        (
            ("results", "--metric", "perplexty"),
            "no metric 'perplexty' (did you mean 'perplexity'?); the runs have perplexity",
        ),
        (("results", "--html", "empty"), "cannot write empty: Is a directory"),
        (("results", "--csv", "file/report.csv"), "cannot write file/report.csv"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(results, arguments, said):
    Path("empty").mkdir()
    Path("file").write_text("")
    assert said in refused(kvmix("report", *arguments))
    assert not Path("results/report.html").exists()
    assert list(Path("empty").iterdir()) == []


@pytest.mark.slow
def test_the_metric_that_is_asked_for_is_the_one_that_is_compared(results):
    assert kvmix("report", "--metric", "perplexity").exit_code == 0
    text = Path("results/report.html").read_text()
    assert 'aria-label="perplexity against stored bits"' in text
    assert ">perplexity, lower is better<" in text


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.usefixtures("undrawn")
def test_a_table_is_broken_between_tasks_and_turned_if_one_is_too_wide(monkeypatch, results, width):
    names = [f"score_{index}" for index in range(12)]
    wide = Scripted(
        "wide", tuple(Metric(name, True) for name in names), lambda name: dict.fromkeys(names, (1.5, 1.25, 1.75))
    )
    measured(Path("results"), wide)
    monkeypatch.setattr("kvmix_cli.console.width", lambda: width)
    _, *out = kvmix("report").stdout.splitlines()
    numbers = [line for line in out if "[" in line or "two" in line]
    assert max(map(len, numbers)) <= width
    assert any(line.startswith("score 11  ") and line.count("[1.25, 1.75]") == 3 for line in numbers)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_table_of_many_plans_is_not_turned_where_that_is_wider():
    plans = [Subject(f"plan {index}", uniform(2, info=INFO)) for index in range(20)]
    names = [f"score_{index}" for index in range(12)]
    wide = Scripted("wide", tuple(Metric(name, True) for name in names), lambda name: dict.fromkeys(names, 1.5))
    measured(Path("results"), wide, plans)
    lines = kvmix("report").stdout.splitlines()
    pieces = sum(line.startswith("plan  ") for line in lines)
    assert pieces and sum(line.startswith("plan 1") for line in lines) == 11 * pieces
    assert max(map(len, lines[1:])) <= 160
    assert not any(line.startswith("score") for line in lines)


@pytest.mark.slow
def test_reporting_needs_no_torch(results):
    script = "import sys; from kvmix_cli.main import app; app(['report', '-q'], standalone_mode=False); "
    script += "sys.exit('torch' in sys.modules)"
    assert forking.run(code=script, imports=forking.LIGHT).returncode == 0


costs = some.lists(some.tuples(some.floats(1, 16), some.floats(-5, 5)), min_size=1, max_size=12)


@given(costs, some.booleans())
def test_the_front_is_exactly_what_nothing_dominates(points, higher):
    best = front(points, higher)
    sign = 1 if higher else -1

    def beaten(point):
        return any(o[0] <= point[0] and sign * o[1] >= sign * point[1] and o != point for o in points)

    assert sorted(best) == [index for index, point in enumerate(points) if not beaten(point)]
    assert [points[index][0] for index in best] == sorted(points[index][0] for index in best)
