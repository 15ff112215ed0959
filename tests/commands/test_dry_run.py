"""`--dry-run` of profile, allocate and eval: what would be done and about how long it takes; nothing is done."""

import pytest
from commandline import kvmix, kvmix_json, refused

from kvmix_cli.models import sources
from kvmix_cli.studies import dry_run

VOCABULARY = 4096
KEYS = {"command", "dry_run", "model", "steps", "seconds", "memory_bytes", "writes", "basis"}


def nothing_was_written(folder):
    return not [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_profile(tmp_path, loaded_once, monkeypatch):
    monkeypatch.setattr(dry_run, "PREDICTIONS", 1000)  # more than all else
    options = ["--samples", 1, "--seq-len", 288]
    answer = kvmix_json("profile", "builtin:tiny", *options, "--dry-run")
    assert answer.keys() >= KEYS
    assert (answer["command"], answer["dry_run"]) == ("profile", True)
    assert answer["writes"] == ["profiles/builtin--tiny/profile.yaml"]
    assert answer["memory_bytes"] > 4 * (6_951_168 + 1000 * 288 * VOCABULARY)
    assert "1 sample of 288 tokens" in answer["steps"][0]["what"]
    assert nothing_was_written(tmp_path)
    assert 0 < answer["seconds"] < 3600


@pytest.mark.slow
def test_a_profile_with_longer_samples(loaded_once, monkeypatch):
    """A sample takes a second for each thousand tokens, and for each million pairs of them."""
    clock = [0.0]

    def measured(loaded, probes, tokens, options, sums):
        clock[0] += len(tokens) / 1e3 + len(tokens) ** 2 / 1e6

    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr("kvmix_cli.profiling.measure.measure_sample", measured)
    monkeypatch.setattr(dry_run, "measure_speed", lambda loaded, step: SPEED)
    options = ["--score", "fisher-metric", "--samples", 2, "--seq-len", 1000, "--longer", "3x2000"]
    answer = kvmix_json("profile", "builtin:tiny", *options, "--dry-run")
    step = answer["steps"][0]
    assert step["what"] == "fisher-metric on 2 samples of 1000 tokens and 3 of 2000"
    assert step["seconds"] == pytest.approx(2 * 2 + 3 * 6)
    short = kvmix_json("profile", "builtin:tiny", *options[:-2], "--dry-run")
    assert short["memory_bytes"] < answer["memory_bytes"] < 3 * short["memory_bytes"]


SPEED = dry_run.ModelSpeed(step=32, base=0.1, slope=1e-4, prompt=0.5)


def test_an_evaluation(tmp_path, loaded_once, monkeypatch):
    """Tests of `recommend` measure the speed of a model; here it is given."""
    monkeypatch.setattr(dry_run, "measure_speed", lambda loaded, step: SPEED)
    options = ["--uniform", 2, "--task", "perplexity,recall,throughput", "--length", 640, "--limit", 2]
    answer = kvmix_json("eval", "builtin:tiny", *options, "--dry-run")
    steps = {step["name"]: step for step in answer["steps"]}
    assert list(steps) == ["perplexity", "recall", "throughput"]
    assert steps["perplexity"]["what"] == "2 samples of 640 tokens with 2 caches"
    assert steps["perplexity"]["seconds"] == pytest.approx(2 * 2 * (SPEED.prefill(256) + SPEED.read(256, 640)))
    assert steps["throughput"]["seconds"] is None
    assert answer["seconds"] == pytest.approx(steps["perplexity"]["seconds"] + steps["recall"]["seconds"])
    assert nothing_was_written(tmp_path)
    shown = kvmix("eval", "builtin:tiny", *options, "--dry-run").stdout
    assert "what eval would do with builtin:tiny; nothing was done" in shown
    assert "not known" in shown
    assert "a few passes on this machine" in shown


def test_an_allocation_is_decided_and_not_saved(profiled, tmp_path):
    answer = kvmix_json("allocate", "--avg-bits", 2.3, "--dry-run")
    assert (answer["model"], answer["memory_bytes"]) == ("org/model", None)
    (path,) = answer["writes"]
    assert not (tmp_path / path).exists()
    saved = kvmix_json("allocate", "--avg-bits", 2.3)
    assert saved["plan"] == path
    assert f"{saved['bits']['nominal']:.4g} nominal" in answer["steps"][0]["what"]
    assert "0.5" in refused(kvmix("allocate", "--stored-bits", 0.5, "--dry-run"))
    assert kvmix("allocate", "--method", "pareto", "--dry-run").exit_code == 2


def test_models_that_are_not_here_are_not_downloaded_and_have_no_times(profiled, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "has_weights", lambda *_: False)
    work = {
        "profile": ["profile", "org/model"],
        "eval": ["eval", "org/model", "--uniform", 2],
        "allocate": ["allocate", "--avg-bits", 3, "--method", "search"],
    }
    for command, line in work.items():
        answer = kvmix_json(*line, "--dry-run")
        assert (answer["command"], answer["seconds"], answer["memory_bytes"]) == (command, None, None)
        assert "does not download" in answer["basis"]
    assert not (tmp_path / "results").exists()


def test_faults_are_found_before_anything_is_timed():
    line = ["eval", "builtin:tiny", "--uniform", 2, "--fail-if", "nonsense>1"]
    assert "nonsense" in refused(kvmix(*line, "--dry-run"))
    line = ["eval", "builtin:tiny", "--uniform", 2, "--task", "recall"]
    assert "--length 65536 is more than the model's limit of 4096" in refused(
        kvmix(*line, "--length", "64K", "--dry-run")
    )
    assert kvmix("eval", "--leaderboard", "--dry-run").exit_code == 2
