"""A full disk after the results are saved: the error says that they are, and where."""

from pathlib import Path

import pytest
from evaluating import Counting
from full_disk import fill_disk

from kvmix_cli import evaluation
from kvmix_cli.plan import Plan
from kvmix_cli.profile import Profile

pytestmark = pytest.mark.usefixtures("loaded_shallow")
FULL = "No space left on device; "


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_the_picture_of_a_profile(kvmix, monkeypatch, ending):
    with monkeypatch.context() as patch:
        fill_disk(patch, ending)
        ran = kvmix("profile", "builtin:tiny", "--samples", 1, "--seq-len", 40, "--plot", f"scores{ending}")
    path = "profiles/builtin--tiny/profile.yaml"
    assert ran.code == 1
    assert ran.error == (
        f"kvmix: error: cannot write scores{ending}: {FULL}the profile is saved: `kvmix inspect {path}` shows it, "
        "--plot draws it"
    )
    assert list(Profile.load(Path(path)).scores) == ["grad-norm"]
    assert kvmix("inspect", path, "--plot", "scores.png").code == 0


@pytest.mark.parametrize(
    ("ending", "saved"),
    [(".html", ""), (".md", ", and saved is page.html"), (".csv", ", and saved is page.html, t.md")],
)
def test_the_files_of_a_report(kvmix, monkeypatch, ending, saved):
    monkeypatch.setattr(evaluation, "get_task", lambda name, options=None: Counting())
    assert kvmix("eval", "builtin:tiny", "--uniform", 2).code == 0
    fill_disk(monkeypatch, ending)
    ran = kvmix("report", "--html", "page.html", "--markdown", "t.md", "--csv", "t.csv")
    assert ran.code == 1
    assert f"{FULL}all runs are as they were{saved}" in ran.error
    assert ("page.html" in saved) == Path("page.html").exists()


@pytest.mark.slow
def test_the_heat_map_of_an_evaluation(kvmix, monkeypatch):
    args = ("eval", "builtin:tiny", "--task", "recall", "--uniform", 2, "--length", 300, "--limit", 1)
    with monkeypatch.context() as patch:
        fill_disk(patch, ".png")
        ran = kvmix(*args, "--output-dir", "out")
    assert ran.code == 1
    assert f"{FULL}all samples and rows are saved in out: the same command with --resume writes the rest" in ran.error
    assert kvmix(*args, "--output-dir", "out", "--resume").code == 0
    assert list(Path("out").glob("*heatmap*.png"))


@pytest.mark.slow
def test_a_plan_of_a_family(kvmix, profiled, monkeypatch):
    fill_disk(monkeypatch, "-3.125.yaml")
    ran = kvmix("allocate", "--method", "pareto")
    folder = Path("profiles/org--model/plans")
    saved = list(folder.glob("*.yaml"))
    assert ran.code == 1
    assert f"{FULL}{len(saved)} of " in ran.error
    assert f"plans are saved in {folder}" in ran.error
    assert all(Plan.load(path) for path in saved)
