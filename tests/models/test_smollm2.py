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
    profile = command("profile", FOLDER, "--samples", "2", "--seq-len", "512", "--score", "grad-norm,fisher")
    assert len(profile["layers"]) == 30
    plan = command("allocate", "--stored-bits", "3.5")
    assert plan["bits"]["stored"] <= 3.5
    answer = command("run", "--prompt", "The three primary colours are", "--max-new-tokens", "16")
    assert answer["new_tokens"] >= 1
    report = command("eval", "--task", "perplexity", "--uniform", "2", "--length", "1024", "--limit", "1")
    loss = {row["plan"]: row["metrics"]["perplexity"]["value"] for row in report["rows"]}
    best = next(name for name in loss if name.startswith("ilp"))
    assert loss["unquantized"] < loss[best] < loss["uniform-2"]


@pytest.mark.parametrize("length", [2048, 8000])
def test_values_are_recalled_through_a_4_bit_cache(length):
    report = command(
        "eval", "--task", "recall", "--model", FOLDER, "--uniform", "4", "--length", str(length), "--limit", "1"
    )
    rows = {row["plan"]: row for row in report["rows"]}
    assert rows["uniform-4"]["quantized_share"] > 0.8
    recalled = {name: row["metrics"]["recall"]["value"] for name, row in rows.items()}
    assert recalled["uniform-4"] >= recalled["unquantized"] - 0.2
