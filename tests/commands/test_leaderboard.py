"""`kvmix eval --leaderboard`: who stands where is worked out on losses that are known, and once measured for real."""

import json
from pathlib import Path

import numpy as np
import pytest
from commandline import kvmix, kvmix_json, refused
from curves import curve, make_score, naive_loss
from evaluating import tiny
from full_disk import fill_disk
from made_up import falling
from with_moments import save_with_moments

from kvmix_cli import evaluation
from kvmix_cli.errors import EvaluationError
from kvmix_cli.evaluation.base import Task
from kvmix_cli.evaluation.tasks.perplexity import Perplexity
from kvmix_cli.profile import Profile
from kvmix_cli.reporting.plots import leaderboard as leaderboard_plot

BOARD = ("eval", "--leaderboard", "--device", "cpu")
SHORT = ("--length", 450, "--prefix", 400, "--limit", 2)
QUICK = ("--stored-bits", 3, "--random-plans", 1, "--task", "perplexity", "--limit", 2)


class Foretold(Perplexity):
    """Perplexity that takes no time: every plan loses exactly what the curves of `loss` say."""

    def __init__(self, profile):
        self.profile = profile
        self.measured = []
        self.before = lambda subject, sample: None

    records = Task.records  # by `measure`

    def measure(self, loaded, subject, sample, settings):
        self.before(subject, sample)
        self.measured.append((subject.name, sample.name))
        lost = 0.0 if subject.plan is None else naive_loss(self.profile, subject.plan.layers, subject.plan.cache)
        nll = 10 * (3.0 + lost) + len(sample.ids) % 7
        return {"tokens": 10, "nll": nll, "attended": {"total": 100, "quantized": subject.plan is not None and 60}}


@pytest.fixture(autouse=True)
def profile(loaded_once):
    """The saved profile of the built-in model, with a score that has curves and the paper's, which has none."""
    k_sizes, v_sizes = np.exp(np.random.default_rng(0).normal(-2, 2, (2, 8)))
    k, v = [curve(size, groups=(64, 128)) for size in k_sizes], [curve(size, groups=(64,)) for size in v_sizes]
    scores = {"grad-norm": falling(8).scores["grad-norm"], "loss": make_score(k, v)}
    found = Profile(model=tiny().info, scores=scores)
    found.save(Path("profiles/builtin--tiny/profile.yaml"))
    return found


@pytest.fixture
def foretold(profile, monkeypatch):
    """A perplexity whose outcome is known, in the place of the measured one."""
    task = Foretold(profile)
    monkeypatch.setattr(evaluation, "get_task", lambda name, options=None: task)
    return task


@pytest.mark.slow
def test_on_losses_that_are_as_predicted_the_exact_solver_wins(foretold):
    board = kvmix_json(*BOARD, *QUICK, "--stored-bits", "3,3.5,4", "--random-plans", 3)["leaderboard"]
    assert board["champion"] == "ilp loss"
    plans = {name for name, _ in foretold.measured} - {"unquantized"}
    assert board["correlations"]["loss"] == {"spearman": pytest.approx(1.0), "plans": len(plans)}
    for stored_bits in (3, 3.5, 4):
        standings = [each for each in board["standings"] if each["stored_bits"] == stored_bits]
        assert "ilp loss" in standings[0]["names"]
        assert all(each["bits"]["stored"] <= stored_bits for each in standings)
        names = {name for each in standings for name in each["names"]}
        solvers = {f"{method} {score}" for method in ("rank", "ilp", "cut") for score in ("grad-norm", "loss")}
        assert names == solvers - {"rank grad-norm"} | {"paper", "uniform", "random 0", "random 1", "random 2"}
        beaten = [each for each in board["comparisons"] if each["stored_bits"] == stored_bits]
        assert [each["second"].split()[0] for each in beaten] == ["paper", "uniform", "random"]
        for each in beaten:
            assert each["difference"]["value"] == each["difference"]["low"] <= 0
            assert 0 < each["ratio"] <= 1


@pytest.mark.slow
def test_rows_have_the_stable_keys_and_standings_name_their_row(foretold):
    result = kvmix_json(*BOARD, *QUICK)
    assert {"command", "model", "task", "tokens", "rows", "reference", "gates"} <= set(result)
    assert (result["task"], result["reference"]) == ("perplexity", "unquantized")
    rows = {row["plan"]: row for row in result["rows"]}
    for each in result["leaderboard"]["standings"]:
        row = rows[each["plan"]]
        assert row["stored_bits"] == each["bits"]["stored"]
        assert row["metrics"]["loss_increase"]["value"] == pytest.approx(each["predicted"]["loss"])


@pytest.mark.slow
def test_a_plan_that_several_would_choose_is_measured_once(foretold):
    board = kvmix_json(*BOARD, *QUICK, "--stored-bits", "2.5,2.6")["leaderboard"]
    lowest = board["standings"][0]
    assert {"uniform", "paper", "rank loss", "cut loss", "random 0"} <= set(lowest["names"])
    assert len(foretold.measured) == len(set(foretold.measured))
    assert {name for name, _ in foretold.measured} == {"unquantized"} | {each["plan"] for each in board["standings"]}


@pytest.mark.slow
def test_tables_and_a_picture_are_left_beside_the_records(foretold):
    ran = kvmix(*BOARD, *QUICK, "--output-dir", "out")
    assert ran.exit_code == 0
    (page_path,) = Path("out").glob("leaderboard__*.md")
    page = page_path.read_text()
    for text in (ran.stdout, page):
        for words in (
            "at most 3 stored bits",
            "ilp loss",
            "ilp loss against paper: ",
            "Spearman",
            "KL",
            "same token",
            "2 documents of 1024",
        ):
            assert words in text
    assert page.startswith("<!-- kvmix eval --leaderboard")
    assert page_path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    named = json.loads(Path("out/leaderboard.json").read_text())
    assert all(len(plan) == 12 and names for plan, names in named.items())


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".md", ".json", ".png"])
def test_a_full_disk_says_what_is_saved(foretold, monkeypatch, ending):
    with monkeypatch.context() as patch:
        fill_disk(patch, "leaderboard.json" if ending == ".json" else ending)
        said = refused_after_results(kvmix(*BOARD, *QUICK, "--output-dir", "out"))
    assert "all samples and rows are saved in out: the same command with --resume writes the rest" in said
    foretold.measured.clear()
    assert kvmix(*BOARD, *QUICK, "--output-dir", "out", "--resume").exit_code == 0
    assert foretold.measured == []


def refused_after_results(ran):
    assert ran.exit_code == 1
    return ran.stderr.splitlines()[-1]


@pytest.mark.slow
def test_another_leaderboard_replaces_neither_tables_nor_names(foretold):
    names = []
    for budget in (2.75, 3, 3):
        assert kvmix(*BOARD, "--stored-bits", budget, *QUICK[2:], "--output-dir", "out").exit_code == 0
        names.append(json.loads(Path("out/leaderboard.json").read_text()))
    assert len(list(Path("out").glob("leaderboard__*.md"))) == 2
    assert set(names[0]) < set(names[1])
    assert names[1] == names[2]


@pytest.mark.slow
def test_an_interrupted_leaderboard_is_gone_on_with(foretold):
    def stop(subject, sample):
        if len(foretold.measured) == 5:
            raise KeyboardInterrupt

    foretold.before = stop
    interrupted = kvmix(*BOARD, *QUICK, "--output-dir", "out")
    assert interrupted.exit_code == 130
    assert "--resume" in interrupted.stderr
    foretold.before = lambda subject, sample: None
    before = list(foretold.measured)
    resumed = kvmix_json(*BOARD, *QUICK, "--output-dir", "out", "--resume")
    assert len(foretold.measured) == len(set(foretold.measured)), "nothing twice"
    assert foretold.measured[:5] == before
    afresh = kvmix_json(*BOARD, *QUICK, "--output-dir", "afresh")
    for row in (*resumed["rows"], *afresh["rows"]):
        assert row.pop("seconds") >= 0, "a time, the only thing that may differ"
    assert resumed["rows"] == afresh["rows"]
    assert resumed["leaderboard"] == afresh["leaderboard"]


@pytest.mark.slow
def test_more_budgets_later_measure_only_what_is_new(foretold):
    kvmix_json(*BOARD, *QUICK, "--stored-bits", 3)
    kvmix_json(*BOARD, *QUICK, "--stored-bits", "3,3.5", "--resume")
    assert len(foretold.measured) == len(set(foretold.measured))


@pytest.mark.slow
def test_who_has_no_plan_at_a_budget_is_left_out_and_named(foretold):
    ran = kvmix(*BOARD, *QUICK, "--stored-bits", "2.25,3", "--group-size", "64,128")
    assert ran.exit_code == 0
    assert "left out: " not in ran.stdout.split("at most 3 stored bits")[1]
    board = kvmix_json(*BOARD, *QUICK, "--stored-bits", "2.4,3", "--group-size", "64,128")["leaderboard"]
    low = [name for each in board["standings"] if each["stored_bits"] == 2.4 for name in each["names"]]
    assert sorted(low) == ["ilp grad-norm", "ilp loss"], "only they may choose larger groups"
    absent = {each["name"]: each["reason"] for each in board["left_out"] if each["stored_bits"] == 2.4}
    assert set(absent) == {"paper", "rank loss", "cut grad-norm", "cut loss", "uniform", "random 0"}
    assert "no plan has 2.4 stored bits" in absent["paper"]


@pytest.mark.slow
def test_transform_codes_are_a_candidate_of_a_profile_with_directions(profile):
    path = Path("profiles/builtin--tiny/profile.yaml")
    save_with_moments(path, tiny().info, profile.scores)
    options = ("--stored-bits", "2.5", "--scores", "loss", "--methods", "ilp,transform", "--random-plans", 1)
    result = kvmix_json(*BOARD, *options, "--task", "perplexity", *SHORT)
    board = result["leaderboard"]
    assert board["champion"] == "transform"
    assert [each["second"].split()[0] for each in board["comparisons"]] == ["ilp", "paper", "uniform", "random"]
    own = next(each for each in board["standings"] if each["names"] == ["transform"])
    assert 2.45 < own["bits"]["stored"] <= 2.5
    assert own["predicted"]["fisher-metric"] > 0
    assert set(board["correlations"]) == {"loss", "fisher-metric"}
    assert all("error" not in row for row in result["rows"])
    assert len(list(path.parent.glob("plans/basis-*.safetensors"))) == 1


@pytest.mark.slow
def test_scores_and_methods_can_be_chosen(foretold):
    board = kvmix_json(*BOARD, *QUICK, "--scores", "loss", "--methods", "cut,rank")["leaderboard"]
    names = {name for each in board["standings"] for name in each["names"]}
    assert names == {"paper", "cut loss", "rank loss", "uniform", "random 0"}
    assert board["champion"] == "rank loss"


@pytest.mark.slow
def test_a_plan_that_cannot_be_measured_stands_last_and_the_exit_code_says_so(foretold):
    def fail(subject, sample):
        if subject.plan is not None and len(set(subject.plan.layers.values())) == 1:
            raise EvaluationError("the loss is nan")

    foretold.before = fail
    result = kvmix_json(*BOARD, *QUICK, code=1)["leaderboard"]
    assert "uniform" in result["standings"][-1]["names"]
    assert "uniform" not in {each["second"] for each in result["comparisons"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--scores", "losss"), "it has no score 'losss'"),
        (("--methods", "ilpp"), "method 'ilpp' has no place in a leaderboard; it compares rank, ilp, cut, transform"),
        (("--methods", "uniform"), "method 'uniform' has no place in a leaderboard"),
        (("--stored-bits", "99"), "no method has a plan at these budgets: no plan has 99 stored bits"),
        (("--task", "recall"), "a leaderboard is in the order of perplexity"),
        (("--profile", "nowhere.yaml"), "nowhere.yaml does not exist"),
    ],
)
def test_what_cannot_be_held_is_one_line_and_leaves_nothing(arguments, said):
    assert said in refused(kvmix(*BOARD, "-q", *arguments))
    assert [path.name for path in Path().iterdir()] == ["profiles"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--leaderboard", "--uniform", "2"),
        ("--leaderboard", "--plan", "0-7:k2v2"),
        ("--leaderboard", "--fail-if", "perplexity>+1%"),
        ("--leaderboard", "--stored-bits", "three"),
        ("--stored-bits", "3"),
        ("--random-plans", "0"),
        ("--profile", "profile.yaml"),
    ],
)
def test_options_that_do_not_go_together(arguments):
    assert kvmix("eval", *arguments).exit_code == 2


@pytest.mark.slow
def test_measured_for_real_and_not_twice(monkeypatch):
    options = ("--stored-bits", "3", "--scores", "loss", "--methods", "ilp", "--random-plans", 1, *SHORT)
    result = kvmix_json(*BOARD, *options)
    assert {row["task"] for row in result["rows"]} == {"perplexity", "recall"}
    assert all("metrics" in row for row in result["rows"])
    compared = [row for row in result["rows"] if row["task"] == "perplexity" and row["plan"] != "unquantized"]
    assert all({"kl", "kl_p99", "same_token"} < set(row["metrics"]) and row["by_position"] for row in compared)
    assert all(row["quantized_share"] > 0 for row in result["rows"] if row["plan"] != "unquantized")
    monkeypatch.setattr(Perplexity, "_read", lambda *arguments: pytest.fail("measured again"))
    assert kvmix_json(*BOARD, *options, "--resume")["leaderboard"] == result["leaderboard"]


@pytest.mark.slow
def test_the_picture_has_a_panel_a_budget_with_names_intervals_and_units(foretold, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(leaderboard_plot, "save", lambda figure, path: drawn.append(figure) or path)
    board = kvmix_json(*BOARD, "--stored-bits", "3,4", *QUICK[2:])["leaderboard"]
    (figure,) = drawn
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title("left") for axes in panels] == ["at most 3 stored bits", "at most 4 stored bits"]
    assert figure.get_suptitle()
    figure.draw_without_rendering()
    for axes, budget in zip(panels, (3, 4), strict=True):
        assert "nats a token with its 95 % interval" in axes.get_xlabel()
        names = [each["names"][0] for each in board["standings"] if each["stored_bits"] == budget]
        shown = [text for text in axes.texts if text.get_text()]
        assert all(any(text.get_text().startswith(name) for text in shown) for name in names)
        intervals = [line for line in axes.lines if line.get_marker() == "|"]
        assert len(intervals) == len(names)
        boxes = [text.get_window_extent() for text in shown]
        assert not any(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[at + 1 :])
