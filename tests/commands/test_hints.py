"""Command lines that kvmix prints as advice: each is taken from the output and run as it stands."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from curves import curve, make_score
from evaluating import Counting, run_folder, shallow
from made_up import falling

import kvmix_cli
from kvmix_cli import evaluation, profiling
from kvmix_cli.models import loading as models
from kvmix_cli.plan import Plan
from kvmix_cli.profile import Profile
from kvmix_cli.serving.checks import difference
from kvmix_cli.studies import demo, search

pytestmark = pytest.mark.usefixtures("loaded_shallow")
SHORT = ("--samples", 2, "--seq-len", 40)
FILES = {
    "allocation/evictions.py",
    "allocation/heads.py",
    "allocation/options.py",
    "allocation/problem.py",
    "commands/allocate.py",
    "commands/profile.py",
    "evaluation/readback.py",
    "main.py",
    "plan/plan.py",
    "reporting/tables/results.py",
    "serving/checks.py",
    "state.py",
    "studies/directions.py",
    "studies/leaderboard/systems.py",
}
"""Files that print a command line; each has a test below (that of a full disk is in `test_full_disk.py`)."""


def hints(said):
    """The command lines between backticks, as arguments."""
    return [shlex.split(line)[1:] for line in re.findall(r"`(kvmix [^`]*)`", said)]


@pytest.fixture
def counting(monkeypatch):
    task = Counting()
    monkeypatch.setattr(evaluation, "get_task", lambda name, options=None: task)
    return task


@pytest.fixture
def ranked():
    """The saved profile of the built-in model, with a ranking alone."""
    return Profile(model=shallow().info, scores=falling(2).scores).save(Path("profiles/builtin--tiny/profile.yaml"))


def stop_at(place):
    def before(subject, sample):
        if (subject.name, sample.name) == place:
            raise KeyboardInterrupt

    return before


@pytest.mark.slow
def test_every_file_that_prints_a_command_line_is_tested_here():
    root = Path(kvmix_cli.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None  # a docstring
            said = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if re.search(r"`kvmix (?!eval`|--version`)|(with|run) `$", said):
                found.add(path.relative_to(root).as_posix())
    assert found <= FILES


@pytest.mark.slow
def test_from_an_empty_folder_to_an_evaluation(kvmix, counting):
    """An evaluation asks for a plan, allocate for a profile, and then each of them works."""
    ran = kvmix("eval", "builtin:tiny")
    assert ran.code == 1
    (allocate,) = hints(ran.error)
    (profile,) = hints(kvmix(*allocate).error)
    assert profile == ["profile", "builtin:tiny"]
    for line in ([*profile, *SHORT], allocate, ["eval", "builtin:tiny"]):
        assert kvmix(*line).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("place", [(), ("--out", "some where/mine.yaml"), ("--profiles-dir", "else where")])
def test_an_unfinished_profile(kvmix, monkeypatch, place):
    """Both the notice of the interrupt and the error of the command that needed the profile."""
    real = profiling.run_profile

    def interrupted(loaded, scores, *, on_step, **options):
        def step(done, total):
            if done == 1:
                raise KeyboardInterrupt

        return real(loaded, scores, on_step=step, **options)

    for which in range(2):
        monkeypatch.setattr(profiling, "run_profile", interrupted)
        ran = kvmix("profile", "builtin:tiny", *SHORT, "--score", "grad-norm", *place)
        assert ran.code == 130
        where = ("--profile", place[1]) if "--out" in place else place
        blocked = kvmix("allocate", "--avg-bits", 3, *where)
        monkeypatch.setattr(profiling, "run_profile", real)
        (line,) = hints((ran.err, blocked.error)[which])
        assert kvmix(*line).code == 0
        assert kvmix("allocate", "--avg-bits", 3, *where).code == 0
        for path in Path().rglob("*.yaml"):
            path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("place", [(), ("--profiles-dir", "else where")])
def test_the_papers_method_says_what_loses_less(kvmix, place):
    assert kvmix("profile", "builtin:tiny", *SHORT, *place).code == 0
    (better,) = hints(kvmix("allocate", "--avg-bits", 3, *place).err)
    assert kvmix(*better, "--samples", 1, "--seq-len", 300).code == 0
    again = kvmix("allocate", "--avg-bits", 3, *place)
    assert (again.code, hints(again.err)) == (0, [])
    assert "method transform" in again.err


@pytest.mark.slow
def test_a_preset_without_directions(kvmix, counting):
    preset = ("eval", "builtin:tiny", "--preset", "transform-2")
    (profile,) = hints(kvmix(*preset).error)
    assert profile == ["profile", "builtin:tiny", "--score", "fisher-metric"]
    assert kvmix(*profile, "--samples", 1, "--seq-len", 300).code == kvmix(*preset).code == 0


@pytest.mark.slow
def test_systems_that_need_a_profile(kvmix):
    work = ("--stored-bits", 3, "--task", "perplexity", "--length", 300, "--prefix", 280, "--limit", 1)
    board = ("eval", "builtin:tiny", "--systems", "--preset", "kivi-2", "--preset", "transform-2", *work)
    (profile,) = hints(kvmix(*board).out)
    assert profile == ["profile", "builtin:tiny", "--score", "fisher-metric"]
    assert kvmix(*profile, "--samples", 1, "--seq-len", 300).code == 0
    assert hints(kvmix(*board).out) == []


@pytest.mark.slow
def test_a_plan_that_an_engine_holds_otherwise(kvmix):
    path = Plan.uniform(shallow().info, 4, 4).save(Path("some where.yaml"))
    (line,) = hints(difference(Plan.load(path), str(path)))
    assert kvmix(*line, "--length", 64, "--limit", 1).code == 0
    said = difference(Plan.load("some where.engine.yaml"), "some where.engine.yaml")
    assert "it diverges by" in said and not hints(said)


@pytest.mark.slow
def test_an_interrupted_evaluation(kvmix, counting):
    assert kvmix("eval", "builtin:tiny", "--uniform", 4).code == 0
    counting.before = stop_at(("uniform-2", "2"))
    ran = kvmix("eval", "builtin:tiny", "--uniform", 2, "--step", 1)
    assert ran.code == 130
    listed = kvmix("report").out
    counting.before = lambda subject, sample: None
    (line,) = hints(ran.err)
    assert hints(listed) == [line]
    counting.measured.clear()
    assert kvmix(*line).code == 0
    assert counting.measured == [("uniform-2", "2"), ("uniform-2", "3")]


def test_an_evaluation_that_ends_before_anything_is_measured(kvmix, counting, monkeypatch):
    """`--resume` is refused for settings under which nothing was measured, so it is not advised either."""
    assert kvmix("eval", "builtin:tiny", "--uniform", 4).code == 0
    args = ("eval", "builtin:tiny", "--uniform", 2, "--step", 1)

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "load_model", interrupted)
        ran = kvmix(*args)
    assert ran.code == 130
    assert "interrupted before anything was measured; start again with the same command" in ran.err
    assert kvmix(*args).code == 0


@pytest.mark.slow
def test_a_damaged_row(kvmix, counting):
    assert kvmix("eval", "builtin:tiny", "--uniform", 2).code == 0
    (run_folder("results", "uniform-2", "counting") / "metrics.json").write_text('{"task": 3')
    (line,) = hints(kvmix("report").err)
    counting.measured.clear()
    assert kvmix(*line).code == 0
    assert counting.measured == []
    assert hints(kvmix("report").err) == []


@pytest.mark.slow
def test_a_plan_of_another_model(kvmix, counting):
    Plan.uniform(falling(4).model, 4, 4).save(Path("plan.yaml"))
    ran = kvmix("eval", "builtin:tiny", "--plan", "plan.yaml")
    assert ran.code == 1
    profile, allocate = hints(ran.error)
    assert kvmix(*profile, *SHORT).code == kvmix(*allocate).code == 0
    assert kvmix("eval", "builtin:tiny").code == 0


@pytest.mark.slow
def test_a_score_that_does_not_predict_a_loss(kvmix, ranked):
    budget = ("allocate", "--max-loss", "5%")
    (line,) = hints(kvmix(*budget, "--method", "ilp").error)
    assert line == ["profile", "builtin:tiny", "--score", "fisher"]
    ranked.unlink()
    assert kvmix(*line, "--samples", 1, "--seq-len", 300).code == kvmix(*budget).code == 0


@pytest.mark.slow
def test_a_choice_that_was_not_measured(kvmix):
    args = ("profile", "builtin:tiny", "--score", "error", "--samples", 1, "--seq-len", 300)
    assert kvmix(*args, "--bits", "2,4", "--group-size", 64, "--encode", "refit", "--seed", 3).code == 0
    budget = ("allocate", "--stored-bits", 3, "--score", "error", "--k-bits", "2,3", "--encode", "refit")
    ran = kvmix(*budget, "--v-bits", "2", "--method", "ilp")
    assert ran.code == 1
    assert "was not measured for keys at 3g64" in ran.error
    (line,) = hints(ran.error)
    assert kvmix(*line).code == 0
    assert kvmix(*budget, "--v-bits", "2", "--method", "ilp").code == 0


@pytest.mark.slow
def test_a_score_without_kv_heads(kvmix):
    few = ("--samples", 1, "--seq-len", 300)
    assert kvmix("profile", "builtin:tiny", "--score", "fisher", *few).code == 0
    budget = ("allocate", "--stored-bits", 3, "--by-head", "widths")
    (line,) = hints(kvmix(*budget).error)
    assert kvmix(*line, *few).code == kvmix(*budget).code == 0


@pytest.mark.slow
def test_evictions_that_were_not_measured(kvmix):
    few = ("--samples", 1, "--seq-len", 300, "--bits", "2,4", "--group-size", 64)
    assert kvmix("profile", "builtin:tiny", "--score", "fisher", *few).code == 0
    budget = ("allocate", "--stored-bits", 2.5, "--page", 64, "--k-bits", "2,4", "--v-bits", "2,4", "--evict", "0,0.5")
    ran = kvmix(*budget, "--method", "ilp")
    assert "and add --score kl" in ran.error
    (line,) = hints(ran.error)
    assert kvmix(*line, *few).code == kvmix(*budget, "--method", "ilp", "--score", "kl").code == 0


@pytest.mark.slow
def test_an_interrupted_search_and_demo(kvmix, monkeypatch, short_demo):
    values = [curve(0.01, groups=(64,))] * 2
    scores = {"loss": make_score(values, values)}
    Profile(model=shallow().info, scores=scores).save(Path("profiles/builtin--tiny/profile.yaml"))
    args = (
        "allocate",
        "--stored-bits",
        4,
        "--method",
        "search",
        "--trials",
        3,
        "--samples",
        1,
        "--page",
        16,
        "--window",
        "recent:16",
    )
    interrupt_once(monkeypatch, search.Bench, "increase")
    ran = kvmix(*args)
    assert ran.code == 130, ran.err
    (line,) = hints(ran.err)
    assert kvmix(*line).code == 0
    interrupt_once(monkeypatch, demo, "evaluate")
    (line,) = hints(kvmix("demo", "--quick", "--samples", 1, "--limit", 1).err)
    assert kvmix(*line).code == 0


def interrupt_once(monkeypatch, owner, name):
    real, calls = getattr(owner, name), []

    def once(*args, **options):
        calls.append(name)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(owner, name, once)
