"""`kvmix demo`: the whole pipeline, on little text."""

import pytest
from commandline import kvmix, kvmix_json, refused

from kvmix_cli.commands.demo import DemoOptions
from kvmix_cli.plan import Plan
from kvmix_cli.profile import Profile
from kvmix_cli.studies import demo as steps


@pytest.mark.slow
def test_the_whole_pipeline_in_an_empty_folder(tmp_path, monkeypatch, short_demo, loaded_shallow):
    monkeypatch.chdir(tmp_path)
    result = kvmix_json("demo", "--quick", "--samples", 2, "--limit", 1)
    folder = tmp_path / "kvmix-demo"
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    profile = Profile.load(folder / "builtin--tiny" / "profile.yaml")
    assert profile.score("grad-norm").calibration.samples == 2
    assert not list(folder.rglob("*.partial*")), "what an interrupted demo would have gone on with"
    plans = {path.stem: Plan.load(path) for path in (folder / "builtin--tiny" / "plans").glob("*.yaml")}
    assert sorted(plans) == ["random-0", "rank", "transform", "uniform-2"]
    assert len({plans[name].bits for name in plans if name not in ("uniform-2", "transform")}) == 1
    rows = {(row["task"], row["plan"]): row for row in result["rows"]}
    assert len(rows) == 2 * (1 + len(plans))
    assert all("error" not in row for row in rows.values())
    assert rows["perplexity", "unquantized"]["quantized_share"] == 0
    assert rows["perplexity", "rank"]["quantized_share"] > 0.75
    kl, stored = (
        {name: read(rows["perplexity", name]) for name in ("transform", "rank", "uniform-2")}
        for read in (lambda row: row["metrics"]["kl"]["value"], lambda row: row["stored_bits"])
    )
    assert kl["transform"] < min(kl["rank"], kl["uniform-2"]) / 4, "even of two samples and two layers"
    assert stored["transform"] < stored["rank"]
    assert result["text"]

    measured = []
    monkeypatch.setattr(steps, "make_profile", counted(steps.make_profile, measured))
    resumed = kvmix_json("demo", "--quick", "--samples", 2, "--limit", 1, "--resume")
    assert measured == [[]], "the finished profile is read, not measured again"
    assert resumed["rows"] == result["rows"]


def counted(make_profile, measured):
    """`make_profile` that notes the steps it reports."""

    def make(*args, on_step, **options):
        seen = []
        measured.append(seen)
        return make_profile(*args, on_step=lambda done, total: seen.append(done), **options)

    return make


def test_quick_is_less_of_everything_that_is_not_given():
    assert DemoOptions().effort == steps.Effort(samples=30, limit=10, random_plans=3)
    assert DemoOptions(quick=True).effort == steps.QUICK
    assert DemoOptions(quick=True, samples=7).effort == steps.Effort(7, steps.QUICK.limit, steps.QUICK.random_plans)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(kvmix("demo", "--out", tmp_path / "file" / "demo"))
