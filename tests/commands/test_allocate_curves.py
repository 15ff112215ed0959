"""`kvmix allocate` with a profile that predicts loss: exact plans, families, and plans refined by measuring."""

import json
import math
import re

import pytest
from curves import curve, curved, make_score
from made_up import falling, make_info

from kvmix_cli.allocation import Budget, allocate, predicted_loss
from kvmix_cli.models.loading import load_info
from kvmix_cli.plan import Plan
from kvmix_cli.profile import Calibration, Profile
from kvmix_cli.studies import search as searching

PLANS = "profiles/org--model/plans"


@pytest.fixture
def predicted(tmp_path):
    """The saved profile of org/model: 8 layers, with curves and a ranking."""
    profile = Profile(model=make_info(8, head_dim=128), scores={**curved(8, scale=0.01).scores, **falling(8).scores})
    profile.save(tmp_path / "profiles" / "org--model" / "profile.yaml")
    return profile


def names(tmp_path):
    return sorted(path.name for path in (tmp_path / PLANS).iterdir())


def test_an_exact_plan_says_what_it_is_predicted_to_lose(kvmix, tmp_path, predicted):
    ran = kvmix("allocate", "--stored-bits", 3, "--method", "ilp", "--group-size", "32,64,128", "--name", "groups")
    plan = Plan.load(tmp_path / PLANS / "groups.yaml")
    loss = plan.provenance["predicted_loss"]
    assert loss == pytest.approx(predicted_loss(plan, predicted.score("loss")), rel=1e-5)
    assert f"{loss:.5f} nats a token, {100 * math.expm1(loss):+.2f} % perplexity, as loss predicts" in ran.out
    assert plan.provenance["group_sizes"] == [32, 64, 128]
    assert plan.cache.group_size == 32


def test_json_has_predicted_loss_and_group_sizes(kvmix, tmp_path, predicted):
    args = ("allocate", "--stored-bits", 2.7, "--method", "ilp", "--group-size", "32,64,128", "--json")
    result = kvmix(*args).json
    assert result["predicted_loss"] == result["provenance"]["predicted_loss"] > 0
    assert result["provenance"]["score"] == "loss"
    sizes = {layer[f"{kind}_group_size"] for layer in result["layers"] for kind in "kv"}
    assert sizes <= {32, 64, 128}
    assert len(sizes) > 1


def test_the_smallest_plan_within_a_loss(kvmix, tmp_path, predicted):
    ran = kvmix("allocate", "--max-loss", "0.5%", "--method", "ilp", "--json")
    assert names(tmp_path) == ["ilp-max-loss-0.5pct.yaml"]
    assert ran.json["provenance"]["budget"] == {"max_loss": 0.005}
    assert ran.json["predicted_loss"] <= math.log(1.005)


def test_a_loss_needs_a_score_that_predicts_it(kvmix, predicted):
    ran = kvmix("allocate", "--max-loss", "0.5%", "--method", "rank")
    assert ran.code == 1
    assert "score 'grad-norm' does not predict a loss, so it cannot keep to --max-loss: use --score loss" in ran.error
    assert kvmix("allocate", "--max-loss", "0.5%", "--method", "rank", "--score", "loss").code == 0
    assert kvmix("allocate", "--max-loss", "0.5%").code == 0


def test_pins_and_bounds(kvmix, tmp_path, predicted):
    args = ("--method", "ilp", "--pin", "0,-1:k8v8;2-3:k4v2", "--pin", "4:k3v3", "--max-bits", 4)
    result = kvmix("allocate", "--avg-bits", 4.5, *args, "--json").json
    assert result["provenance"]["pins"] == {"0": "k8v8", "2": "k4v2", "3": "k4v2", "4": "k3v3", "7": "k8v8"}
    widths = [(layer["k_bits"], layer["v_bits"]) for layer in result["layers"]]
    assert [widths[i] for i in (0, 2, 3, 4, 7)] == [(8, 8), (4, 2), (4, 2), (3, 3), (8, 8)]
    assert max(map(max, (widths[i] for i in (1, 5, 6)))) <= 4
    kvmix("inspect", result["plan"])


def test_one_notice_if_the_curves_were_measured_with_other_settings(kvmix, tmp_path, predicted):
    profile = curved(8, setup={"page": 128, "scale_dtype": "float16"})
    profile.save(tmp_path / "profiles" / "org--model" / "profile.yaml")
    args = ("allocate", "--stored-bits", 3.5, "--method", "ilp")
    ran = kvmix(*args, "--page", 64, "--scale-dtype", "bfloat16")
    notices = [line for line in ran.err.splitlines() if "measured with other settings" in line]
    assert notices == [
        "kvmix: loss was measured with other settings than the plan's: "
        "page 64 instead of 128, scale_dtype bfloat16 instead of float16"
    ]
    assert "other settings" not in kvmix(*args).err


def test_a_method_that_does_not_choose_groups_says_so(kvmix, predicted):
    args = ("allocate", "--stored-bits", 3.5, "--group-size", "32,64")
    ran = kvmix(*args, "--method", "rank")
    assert "rank does not choose among group sizes: all groups have 32 elements" in ran.err
    assert "group sizes" not in kvmix(*args).err


@pytest.mark.slow
def test_a_family(kvmix, tmp_path, predicted):
    ran = kvmix("allocate", "--method", "pareto")
    found = names(tmp_path)
    assert "pareto-2.5.yaml" in found
    assert len(found) > 12
    for name in found:
        plan = Plan.load(tmp_path / PLANS / name)
        assert f"pareto-{plan.provenance['budget']['stored_bits']:g}.yaml" == name
        assert f"{plan.provenance['predicted_loss']:.5f}" in ran.out
    assert (tmp_path / PLANS / "pareto-2.5.yaml").read_text().startswith("# kvmix allocate --method pareto")


@pytest.mark.slow
def test_a_family_of_other_options_replaces_nothing(kvmix, tmp_path, predicted):
    """Members end in a hash of the options, as single plans do; a name of the user's own is kept as it is."""
    assert kvmix("allocate", "--method", "pareto").err.count("replaced") == 0
    first = {name: (tmp_path / PLANS / name).read_bytes() for name in names(tmp_path)}
    ran = kvmix("allocate", "--method", "pareto", "--group-size", "64,128")
    others = set(names(tmp_path)) - set(first)
    assert all(re.fullmatch(r"pareto-[\d.]+-[0-9a-f]{6}\.yaml", name) for name in others)
    assert len(others) > 12
    assert {name: (tmp_path / PLANS / name).read_bytes() for name in first} == first
    assert "replaced" not in ran.err + kvmix("allocate", "--method", "pareto", "--group-size", "64,128").err
    assert set(names(tmp_path)) == others | set(first)

    kvmix("allocate", "--method", "pareto", "--name", "mine")
    ran = kvmix("allocate", "--method", "pareto", "--name", "mine", "--group-size", "128")
    assert "mine-2.5.yaml was another plan, and is replaced" in ran.err


@pytest.mark.slow
def test_plans_of_two_named_profiles_replace_nothing(kvmix, tmp_path):
    for count in (4, 5):
        falling(count).save(tmp_path / f"{count}.yaml")
        assert kvmix("allocate", "--avg-bits", 2.5, "--method", "rank", "--profile", f"{count}.yaml").code == 0
        assert kvmix("allocate", "--method", "pareto", "--profile", f"{count}.yaml").code == 0
    singles = [name for name in names(tmp_path) if name.startswith("rank")]
    assert len(singles) == len({name.split("-")[-1] for name in singles}) == 2
    found = [Plan.load(tmp_path / PLANS / name) for name in names(tmp_path)]
    assert len({plan.provenance["profile_sha256"] for plan in found}) == 2


@pytest.mark.slow
def test_a_family_as_json(kvmix, tmp_path, predicted):
    result = kvmix("allocate", "--method", "pareto", "--name", "mine", "--json").json
    assert (result["command"], result["method"], result["score"]) == ("allocate", "pareto", "loss")
    assert sorted(plan["plan"].removeprefix(f"{PLANS}/") for plan in result["plans"]) == names(tmp_path)
    stored = [plan["bits"]["stored"] for plan in result["plans"]]
    losses = [plan["predicted_loss"] for plan in result["plans"]]
    assert stored == sorted(stored)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_a_family_without_curves(kvmix, tmp_path, profiled):
    ran = kvmix("allocate", "--method", "pareto")
    assert f"{len(names(tmp_path))} plans for org/model by grad-norm" in ran.out


@pytest.fixture
def tiny(tmp_path):
    """A saved profile of builtin:tiny whose curves are made up: every layer matters half as much as the one before."""
    info = load_info("builtin:tiny")
    k, v = ([curve(0.1 / 2**layer) for layer in range(info.layers)] for _ in "kv")
    score = make_score(k, v)
    calibration = Calibration(source="builtin", sha256="ab", samples=1, seq_len=192, seed=0, tokens=192)
    score = score.model_copy(update={"calibration": calibration})
    profile = Profile(model=info, scores={"loss": score})
    profile.save(tmp_path / "profiles" / "builtin--tiny" / "profile.yaml")
    return profile


SEARCH = (
    *("allocate", "--stored-bits", 3.5, "--method", "search", "--trials", 4, "--samples", 2),
    *("--page", 32, "--group-size", 32, "--window", "recent:32", "--name", "search-stored-3.5-seed0"),
)
FOLDER = "profiles/builtin--tiny/plans"


@pytest.mark.slow
def test_a_search_measures_and_never_gets_worse(kvmix, tmp_path, tiny):
    result = kvmix(*SEARCH, "--json").json
    plan = Plan.load(tmp_path / FOLDER / "search-stored-3.5-seed0.yaml")
    assert plan.bits.stored <= 3.5
    assert result["provenance"]["trials"] == 4
    header, *trials = map(
        json.loads, (tmp_path / FOLDER / "search-stored-3.5-seed0.trials.jsonl").read_text().splitlines()
    )
    assert header["calibration"]["samples"] == 2
    assert result["provenance"]["measured_loss"] == min(trial["loss"] for trial in trials)
    assert len({trial["plan"] for trial in trials}) == 4
    start = allocate(tiny, Budget(stored_bits=3.5), method="ilp", cache=plan.cache)
    assert trials[0]["plan"] == searching.layers_key(start.layers)


@pytest.mark.slow
def test_an_interrupted_search_goes_on(kvmix, tmp_path, tiny, monkeypatch):
    increase, measured = searching.Bench.increase, []

    def interrupted(self, layers):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(layers)
        return increase(self, layers)

    monkeypatch.setattr(searching.Bench, "increase", interrupted)
    ran = kvmix(*SEARCH)
    assert ran.code == 130
    assert "--resume" in ran.err
    assert not (tmp_path / FOLDER / "search-stored-3.5-seed0.yaml").exists()
    monkeypatch.setattr(
        searching.Bench, "increase", lambda self, layers: measured.append(layers) or increase(self, layers)
    )
    result = kvmix(*SEARCH, "--resume", "--json").json
    assert len(measured) == 4
    assert result["provenance"]["trials"] == 4


def test_a_search_says_what_is_wrong_before_it_loads_the_model(kvmix, tiny, monkeypatch):
    monkeypatch.setattr("kvmix_cli.models.loading.load_model", lambda *_, **__: pytest.fail("loaded"))
    ran = kvmix("allocate", "--stored-bits", 1, "--method", "search")
    assert "no plan has 1 stored bits" in ran.error
    assert ran.code == 1


@pytest.mark.slow
def test_a_search_that_reads_nothing_quantized_is_an_error(kvmix, tiny):
    ran = kvmix("allocate", "--stored-bits", 3.5, "--method", "search", "--samples", 1)
    assert ran.code == 1
    assert "nothing quantized was read: sink, window and page hold all of 192 tokens" in ran.error
