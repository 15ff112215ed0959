"""`kvmix recommend`: from nothing to a proven plan on little text, again from what is kept, and what is refused."""

import json
from pathlib import Path

import pytest

from kvmix_cli import profiling
from kvmix_cli.evaluation.tasks.perplexity import Perplexity
from kvmix_cli.plan import Plan
from kvmix_cli.profile import Profile
from kvmix_cli.studies.recommend import plans

LITTLE = ("builtin:tiny", "--context", 336, "--limit", 6, "--step", 64)


@pytest.fixture(autouse=True)
def _little_text(monkeypatch, loaded_shallow):
    monkeypatch.setattr(profiling, "default_samples", lambda scores: 2)
    monkeypatch.setattr(plans, "SEQ_LEN", 288)
    monkeypatch.setattr(plans, "STORED_BITS", (1, 2, 4))


def kept():
    """All files by what they say; rows say when they were written, and records may have their keys in another order."""
    paths = [path for path in Path().rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: said(path) for path in paths if path.name != "metrics.json"}


def said(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return path.read_bytes()


@pytest.mark.slow
def test_from_nothing_to_a_proven_plan_and_again_from_what_is_kept(kvmix, monkeypatch):
    ran = kvmix("recommend", *LITTLE, "--max-loss", "40%", "--json")
    found = ran.json
    assert ran.code == 0
    assert (found["command"], found["model"], found["context"]) == ("recommend", "builtin:tiny", 336)
    assert (found["verdict"], found["safe_context"]) == ("not-proven", 336), "36 values of recall are too few"
    assert "recall" in found["text"] and "24 more values are needed (a larger --limit)" in found["text"]
    plan = Plan.load(Path(found["plan"]))
    assert plan.bits.stored == found["stored_bits"]
    assert found["cache_bytes"] == plan.cache_bytes(336, element_bytes=4).total
    evidence = {(each["task"], each["metric"], each.get("depth")): each for each in found["evidence"]}
    kl = evidence["perplexity", "kl", None]
    assert 0 < kl["low"] <= kl["value"] <= kl["high"] <= found["max_kl"]
    assert (kl["reference"], evidence["perplexity", "same_token", None]["reference"]) == (0, 1)
    assert {depth for task, _, depth in evidence if task == "recall"} == {None, 0.0, 0.25, 0.5, 0.75, 1.0}
    assert found["commands"]["transformers"] == f"kvmix run --plan {found['plan']} --prompt ..."
    said = found["commands"]["vLLM"]
    assert "cannot express this plan" in said
    measure = f"kvmix export {found['plan']} --to vllm-plugin --measure --out engine.yaml"
    assert said.endswith(f"or with our plugin, which has no window such as this proof rests on: `{measure}` first")
    assert "cannot express this plan" in found["commands"]["llama.cpp"]
    assert "vllm" not in found["commands"]["llama.cpp"]
    assert Profile.load(Path("profiles/builtin--tiny/profile.yaml")).score("fisher-metric").moments is not None

    before = kept()
    with monkeypatch.context() as patch:
        patch.setattr(Perplexity, "_read", lambda *args: pytest.fail("all documents were read before"))
        again = kvmix("recommend", *LITTLE, "--max-loss", "40%")
    assert again.out.count("not proven at 336 tokens: ") == 1
    assert "using profile" in again.err
    assert kept() == before

    hopeless = kvmix("recommend", *LITTLE[:3], "--limit", 1, "--max-loss", 0, "--task", "perplexity")
    assert hopeless.code == 0
    assert "not safe at 336 tokens: no plan passes, the nearest is transform-stored-4 at 3.99" in hopeless.out
    assert "kvmix run" not in hopeless.out, "what is not safe is not recommended"


@pytest.mark.slow
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(kvmix):
    found = kvmix("recommend", *LITTLE, "--dry-run", "--json").json
    assert found["dry_run"] is True
    assert [step["name"] for step in found["steps"]] == ["profile", "read codes", "compare", "prove", "recall"]
    assert found["seconds"] == pytest.approx(sum(step["seconds"] for step in found["steps"]))
    assert all(step["seconds"] > 0 for step in found["steps"])
    shares = {step["name"]: [each / step["seconds"] for each in step["seconds_range"]] for step in found["steps"]}
    assert shares["profile"] == shares["read codes"] == [1, 1]
    assert shares["compare"] == pytest.approx([1 / 2, 2]), "2 to 8 plans, 4 as a rule"
    assert shares["prove"] == pytest.approx([1 / 2, 3 / 2]), "1 to 3 plans, 2 as a rule"
    assert shares["recall"] == pytest.approx([1, 2]), "the unquantized cache once, and 1 to 3 plans"
    least, most = found["seconds_range"]
    assert least < found["seconds"] < most
    assert found["memory_bytes"] > 2**20
    assert "a few passes on this machine" in found["basis"]
    assert kept() == {}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--context", "5000"), "--context 5000 is more than the 4096 tokens that builtin:tiny was made for"),
        (("--memory", "1MiB"), "builtin:tiny needs 9.63 MiB for its weights alone, and --memory is 1 MiB: give more"),
        (("--text", "missing.txt"), "missing.txt"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(kvmix, options, error):
    ran = kvmix("recommend", "builtin:tiny", *options)
    assert ran.code == 1
    assert error in ran.error
    assert ran.out == ""
    assert not list(Path().rglob("*.yaml"))


@pytest.mark.parametrize("loss", ["1", "2.5", "x", "-0.1", "1%%"])
def test_a_loss_that_may_be_a_share_or_percent_is_refused(kvmix, loss):
    ran = kvmix("recommend", "builtin:tiny", f"--max-loss={loss}")
    assert ran.code == 2
    assert f"'{loss}' is not a" in ran.err


def test_a_model_must_be_named(kvmix):
    ran = kvmix("recommend", "--context", "2K")
    assert ran.code == 2
    assert "name the model" in ran.err
