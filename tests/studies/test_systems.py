"""Published systems at equal stored bytes: their rows, what is left out, and every row run on a small model."""

from pathlib import Path

import pytest
from commandline import kvmix, kvmix_json, refused
from curves import curved
from evaluating import save_small
from learned_books import with_made_up_codebooks
from with_moments import save_with_moments

from kvmix_cli.cache.subject import Subject
from kvmix_cli.errors import EvaluationError, StateError
from kvmix_cli.evaluation.results import Estimate, Report, Row
from kvmix_cli.models.loading import load_model
from kvmix_cli.plan import Plan
from kvmix_cli.plan.presets import presets
from kvmix_cli.plan.tensor_files import check_files
from kvmix_cli.reporting.tables.systems import system_tables
from kvmix_cli.studies.directions import FoundProfile
from kvmix_cli.studies.leaderboard import Board
from kvmix_cli.studies.leaderboard.standings import Standing
from kvmix_cli.studies.leaderboard.systems import (
    CHAMPION,
    COMBINATIONS,
    hold_systems,
    rows_of_systems,
    system_plans,
)
from kvmix_cli.studies.leaderboard.systems import LAYERS as LAYERED

LAYERS = 4
READING = {"pqcache", "quest", "shadowkv", "tokenselect"}
"""They read 2,048 tokens at a step, which is all of the contexts here."""
SIZE = 3.0
TOO_LARGE = {"minikv"}
"""It has no plan of 3 bits in four layers: less is all there is."""
SHORT = ("--length", 640, "--prefix", 560, "--step", 80, "--limit", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of four layers with random weights and the tokenizer of builtin:tiny, and its profile."""
    place = tmp_path_factory.mktemp("systems")
    save_small(place / "model", LAYERS)
    scores = {}
    for seed, name in enumerate(LAYERED.values()):
        groups = (64,) if name == "kl" else (64, 128)
        scores |= curved(LAYERS, head_dim=64, name=name, seed=seed, groups=groups).scores
    info = load_model(str(place / "model"), device="cpu").info
    profile = save_with_moments(place / "profile.yaml", info, scores)
    with_made_up_codebooks(profile, place).save(place / "profile.yaml")
    return place


@pytest.fixture(scope="module")
def small(folder):
    return load_model(str(folder / "model"), device="cpu")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def measured(folder):
    return FoundProfile.load(folder / "profile.yaml")


def test_every_preset_is_a_row_beside_the_combinations():
    assert rows_of_systems() == (*presets(), *COMBINATIONS)


@pytest.mark.slow
def test_every_row_has_a_plan_of_every_size_or_a_reason(small, measured):
    plans, left_out = system_plans(small.info, 2048, measured=measured)
    found = {(each.stored_bits, each.name) for each in plans}
    absent = {(each.stored_bits, each.name): each.reason for each in left_out}
    assert found | set(absent) == {(size, name) for size in (2.0, 2.5, 3.0, 4.0) for name in rows_of_systems()}
    assert not found & set(absent)
    assert {name for size, name in absent if size == SIZE} == TOO_LARGE | READING
    assert "reads 2048 tokens a step, which is all of a context of 2048" in absent[SIZE, "quest"]
    longer, _ = system_plans(small.info, 4096, names=("quest",), stored_bits=(SIZE,))
    assert [each.plan.cache.reading.tokens for each in longer] == [2048]
    budgets = [each for each in plans if (tokens := each.plan.cache.tokens) is not None and tokens.keep is not None]
    assert all(each.plan.bits.stored <= each.stored_bits + 0.005 for each in plans if each not in budgets)


def test_what_is_put_on_a_row_takes_no_bytes_of_its_own(small):
    names = ("mikv", "mikv+rotate-2")
    plans, _ = system_plans(small.info, 2048, names=names, stored_bits=(3.0,))
    alone, both = (each.plan for each in plans)
    assert both.bits == alone.bits
    assert both.layers == alone.layers
    assert [each.kind for each in both.cache.transforms.k] == ["balance", "rotate"]


def test_without_a_profile_rows_that_need_one_are_left_out(small):
    names = ("kivi-2", "transform-2", "layers", "layers+rotate-2", "cq")
    plans, left_out = system_plans(small.info, 2048, names=names, stored_bits=(3.0,))
    assert [each.name for each in plans] == ["kivi-2"]
    assert [each.name for each in left_out] == list(names[1:])
    assert all(f"run `kvmix profile {small.info.id} --score fisher" in each.reason for each in left_out[:-1])
    assert f"run `kvmix profile {small.info.id} --score codebooks`" in left_out[-1].reason


def test_codebooks_of_a_profile_are_beside_the_plans(small, measured):
    (found,), _ = system_plans(small.info, 2048, names=("cq",), stored_bits=(2.0,), measured=measured)
    codecs = found.plan.cache.codecs
    assert found.plan.bits.stored == found.plan.bits.nominal == 2
    assert Path(codecs.located(codecs.codebooks)).parent == measured.folder / "plans"
    assert codecs.sha256 == measured.profile.score("codebooks").codebooks.sha256
    check_files(found.plan)
    again = Plan.load(found.plan.save(measured.folder / "plans" / "cq.yaml"))
    check_files(again)
    assert again.sha256 == found.plan.sha256


def test_a_row_that_is_no_preset_is_refused(small):
    with pytest.raises(StateError, match="unknown preset 'mikw' \\(did you mean 'mikv'"):
        system_plans(small.info, 2048, names=("kivi-2", "mikw"))
    with pytest.raises(EvaluationError, match="no system has a plan at these sizes: preset 'minikv' has no plan of 4"):
        system_plans(small.info, 2048, names=("minikv",), stored_bits=(4.0,))


@pytest.mark.slow
def test_every_row_runs_on_a_small_model_in_the_bytes_that_it_promises(folder, small, measured, monkeypatch):
    """The rows of docs/systems.md, whole: plans, caches, both readings of a prompt, bytes, tables and JSON."""
    monkeypatch.setattr("kvmix_cli.models.loading.load_model", lambda model, **options: small)
    result = kvmix_json(
        *("eval", "--systems", "--model", folder / "model", "--profile", folder / "profile.yaml"),
        *("--stored-bits", SIZE, "--task", "perplexity,memory", *SHORT),
    )
    board = result["leaderboard"]
    names = {name for each in board["standings"] for name in each["names"]}
    assert names == set(rows_of_systems()) - TOO_LARGE - READING
    assert {each["name"] for each in board["left_out"]} == TOO_LARGE | READING
    assert not [row for row in result["rows"] if "error" in row]
    called = {each["plan"]: each["names"] for each in board["standings"]}
    off = {
        called[row["plan"]][0]: row["metrics"]["prediction_error_percent"]["value"]
        for row in result["rows"]
        if row["task"] == "memory" and row["plan"] in called
    }
    assert all(-0.05 < error <= 0 for error in off.values()), "but for statistics of the token that is decoded"
    losses = [row["metrics"]["kl"]["value"] for row in result["rows"] if "kl" in row.get("metrics", {})]
    assert len(losses) == len(board["standings"])
    assert all(loss >= 0 for loss in losses)
    compared = {each["first"] for each in board["comparisons"]}
    alike = next(set(each["names"]) for each in board["standings"] if CHAMPION in each["names"])
    assert compared == names - alike


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(folder, small, monkeypatch):
    monkeypatch.setattr("kvmix_cli.models.loading.load_model", lambda model, **options: small)
    filled, cache = [], Subject.cache
    monkeypatch.setattr(
        Subject, "cache", lambda self, *args, **kw: filled.append(self.name) or cache(self, *args, **kw)
    )
    options = ("eval", "--systems", "--model", folder / "model", "--profile", folder / "profile.yaml")
    work = ("--preset", "kivi-2", "--preset", "streaming-512", "--task", "perplexity", *SHORT)
    first = kvmix_json(*options, *work, "--stored-bits", 3)
    before = {each["plan"] for each in first["leaderboard"]["standings"]}
    assert before <= set(filled)
    filled.clear()
    again = kvmix_json(*options, *work, "--stored-bits", "2.5,3", "--resume")
    assert not before & set(filled)
    assert [each for each in again["leaderboard"]["standings"] if each["stored_bits"] == 3] == first["leaderboard"][
        "standings"
    ]


@pytest.mark.slow
def test_tables_say_bits_of_the_context_and_what_is_missing(folder, small, monkeypatch):
    monkeypatch.setattr("kvmix_cli.models.loading.load_model", lambda model, **options: small)
    names = ("kivi-2", "minikv", "h2o-512")
    options = (
        "eval",
        "--systems",
        "--model",
        folder / "model",
        *(part for name in names for part in ("--preset", name)),
    )
    ran = kvmix(*options, "--stored-bits", 4, "--task", "perplexity", *SHORT, "--output-dir", "out")
    assert ran.exit_code == 0
    assert "no profile of" in ran.stderr
    (page,) = Path("out").glob("systems__*.md")
    for text in (ran.stdout, page.read_text()):
        for words in (
            "4 stored bits",
            "bits at 640",
            "against kivi-2",
            "left out: minikv: preset 'minikv' has no plan",
        ):
            assert words in text
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "h2o-512 at 4" in Path("out/leaderboard.json").read_text()


def test_options_of_other_boards_are_refused():
    for option in (("--scores", "kl"), ("--methods", "ilp"), ("--plan", "x"), ("--uniform", 2), ("--leaderboard",)):
        assert kvmix("eval", "--systems", "--model", "builtin:tiny", *option).exit_code == 2, option
    said = refused(kvmix("eval", "--systems", "--model", "builtin:tiny", "--task", "recall"))
    assert "a leaderboard is in the order of perplexity, got recall: add it to --task" in said


def test_a_model_must_be_told_from_something():
    assert "no profile" in refused(kvmix("eval", "--systems"))


@pytest.mark.slow
def test_it_is_held_from_python_and_prints_nothing(small, capsys):
    from kvmix_cli.evaluation.base import Settings

    settings = Settings(length=400, prefix=360, limit=1)
    board = hold_systems(
        small.info,
        lambda: small,
        tasks=("perplexity",),
        settings=settings,
        names=("kivi-2", "rotate-2"),
        stored_bits=(2.5,),
    )
    assert [(each.first, each.second) for each in board.comparisons] == [("rotate-2", "kivi-2")]
    assert capsys.readouterr() == ("", "")


def test_a_column_for_each_task_that_was_measured_whatever_members_it_has(small):
    plans, _ = system_plans(small.info, 2048, names=("kivi-2",), stored_bits=(3.0,))
    metrics = {"perplexity": {"kl": Estimate(0.25, 0.2, 0.3)}, "longbench:lcc": {"longbench": Estimate.exact(31.5)}}
    rows = {task: Row(task, "kivi-2", 2.5, 3.0, metrics=found) for task, found in metrics.items()}
    reports = [Report(task, 1, task, (row,)) for task, row in rows.items()]
    board = Board(CHAMPION, [Standing(3.0, ("kivi-2",), plans[0].plan, rows)], reports, [], {}, [])
    (table,) = system_tables(board, 2048)
    shown = dict(zip(table.columns, table.rows[0], strict=True))
    assert (shown["KL"], shown["same token"], shown["LongBench"]) == ("0.25 [0.2, 0.3]", "-", "31.5")
    assert not {"recall", "bytes", "tokens/s"} & set(shown)
