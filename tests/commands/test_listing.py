"""`kvmix list` and `kvmix env`: names are those that options take, without torch; facts for a bug report."""

import subprocess
import sys
import warnings

import pytest
from commandline import kvmix, kvmix_json, refused
from kvmix_kernels.runtime.fallback import FallbackWarning
from made_up import make_info

from kvmix_cli.allocation import METHODS
from kvmix_cli.cache.merging import MERGES
from kvmix_cli.cache.policies import CHANNEL_SCORES, TOKEN_SCORES
from kvmix_cli.codecs import CODECS
from kvmix_cli.evaluation import SETS, tasks
from kvmix_cli.export import TARGETS
from kvmix_cli.plan import Plan
from kvmix_cli.plan.presets import presets
from kvmix_cli.profiling import PROBES
from kvmix_cli.studies.listing import first_sentence, kinds, list_items

NAMES = {
    "presets": presets,
    "probes": lambda: PROBES,
    "solvers": lambda: METHODS,
    "tasks": lambda: [*tasks(), *SETS],
    "codecs": lambda: CODECS,
    "policies": lambda: [*TOKEN_SCORES, *MERGES, *CHANNEL_SCORES],
    "exports": lambda: TARGETS,
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_are_those_of_the_registries(kind):
    answer = kvmix_json("list", kind)
    assert (answer["command"], answer["kind"]) == ("list", kind)
    assert [item["name"] for item in answer["items"]] == list(NAMES[kind]())
    assert all(item["summary"] for item in answer["items"])


def test_plans_and_models_of_this_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    plans = tmp_path / "profiles" / "org--model" / "plans"
    Plan.uniform(make_info(), 4, 2).save(plans / "mine.yaml")
    (plans / "torn.yaml").write_text("format: [")
    found = kvmix_json("list", "plans")["items"]
    assert [item["name"] for item in found] == ["mine", "torn"]
    assert found[0]["summary"].startswith("3 nominal, 3.5 stored bits")
    assert (found[0]["model"], found[1]["summary"].startswith("faulty: ")) == ("org/model", True)
    assert [item["name"] for item in kvmix_json("list", "plans", "--model", "other")["items"]] == ["torn"]
    assert {"builtin:tiny", "org/model"} <= {item["name"] for item in kvmix_json("list", "models")["items"]}


def test_without_a_kind_there_is_one_line_for_each():
    answer = kvmix_json("list")
    assert [item["name"] for item in answer["items"]] == list(kinds())
    shown = kvmix("list")
    assert "grad-norm, taylor" in shown.stdout
    assert "none yet" in shown.stdout  # plans
    assert "did you mean 'tasks'" in refused(kvmix("list", "task"))


def test_first_sentences():
    assert first_sentence("As in\narXiv 2410.1, section 4. And more.") == "As in arXiv 2410.1, section 4"
    assert (first_sentence("One."), first_sentence("no end"), first_sentence("")) == ("One", "no end", "")


@pytest.mark.slow
def test_listing_loads_no_torch():
    script = (
        "import sys\nfrom kvmix_cli.studies.listing import kinds, list_items\n"
        "for kind in kinds():\n    list_items(kind)\nassert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    assert list_items("models")


def test_the_environment():
    answer = kvmix_json("env")
    assert answer.keys() >= {"command", "versions", "devices", "kernels", "threads", "folders", "missing"}
    assert answer["versions"]["torch"]
    assert answer["devices"][0]["kind"] == "cpu"
    assert answer["devices"][0]["processors"] >= 1
    assert answer["kernels"]["cpu"].keys() >= {"in_use"}
    assert answer["threads"]["torch"] >= 1
    shown = kvmix("env")
    assert shown.exit_code == 0, shown.stderr
    assert "cpu kernels" in shown.stdout


def test_what_is_missing_is_said_with_the_command_that_brings_it(monkeypatch):
    from kvmix_cli.studies import environment

    real = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: None if name == "lm-eval" else real(name))
    monkeypatch.setenv("KVMIX_NATIVE", "0")
    environment_missing = {each["what"]: each["get"] for each in kvmix_json("env")["missing"]}
    assert environment_missing["lm-eval"] == "pip install 'kvmix[eval]'"
    assert "lm-eval" in kvmix("env").stdout


def test_other_libraries_warnings_are_no_reason(monkeypatch):
    def found():
        warnings.warn("CUDA initialization: the driver is old", UserWarning, stacklevel=1)
        warnings.warn("kvmix's CPU kernels are not available", FallbackWarning, stacklevel=1)
        return "none"

    monkeypatch.setattr("kvmix_kernels.runtime.native.instruction_set", found)
    assert kvmix_json("env")["kernels"]["cpu"] == {"in_use": None, "reason": "kvmix's CPU kernels are not available"}
