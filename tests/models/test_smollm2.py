"""A real model through every command: SmolLM2-135M, which `make smollm2` fetches."""

import pytest
from commandline import kvmix_json as command
from fetch_smollm2 import model_folder

pytestmark = pytest.mark.network
FOLDER = str(model_folder())


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """All commands of this file share one empty folder, as a user's would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("smollm2"))
        yield


def test_a_plan_from_profile_to_measured_loss():
    profile = command("profile", FOLDER, "--samples", "2", "--score", "grad-norm,fisher,fisher-metric")
    assert len(profile["layers"]) == 30
    plan = command("allocate", "--stored-bits", "2.25")
    assert plan["method"] == "transform"
    assert 2.2 < plan["bits"]["stored"] <= 2.25
    layers = command(
        "allocate", "--stored-bits", "2.75", "--method", "ilp", "--group-size", "64,128", "--name", "layers"
    )
    answer = command("run", "--plan", "layers", "--prompt", "The three primary colours are", "--max-new-tokens", "16")
    assert answer["new_tokens"] >= 1
    options = ("--plan", plan["plan"], "--plan", layers["plan"], "--uniform", "2", "--limit", "1")
    rows = command("eval", "--task", "perplexity", *options)["rows"]
    names = ("uniform-2", "layers", "transform-stored-2.25")
    rows = {row["plan"]: row["metrics"] for row in rows}
    worst, middle, best = (rows[name]["kl"]["value"] for name in names)
    assert worst > 2 * middle > 4 * best, "of 2.5, 2.75 and 2.25 stored bits"
    assert rows["unquantized"]["perplexity"]["value"] < rows["uniform-2"]["perplexity"]["value"]


@pytest.mark.parametrize("length", [2048, 8000])
def test_values_are_recalled_through_a_4_bit_cache(length):
    report = command(
        "eval", "--task", "recall", "--model", FOLDER, "--uniform", "4", "--length", str(length), "--limit", "1"
    )
    rows = {row["plan"]: row for row in report["rows"]}
    assert rows["uniform-4"]["quantized_share"] > 0.8
    recalled = {name: row["metrics"]["recall"]["value"] for name, row in rows.items()}
    assert recalled["uniform-4"] >= recalled["unquantized"] - 0.2
