"""Refinement on measured loss: better than its start, within the budget, reproducible, and able to go on."""

import json
import math
from itertools import count

import pytest
from curves import curved, naive_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import falling, make_info

from kvmix_cli.allocation import Budget, allocate, parse_pins, refine
from kvmix_cli.allocation.trials import Trials, short_key
from kvmix_cli.errors import BudgetError, DocumentError, OutputError
from kvmix_cli.plan import LayerPlan, Plan, TensorPlan

LADDERS = {"k_bits": (2, 3, 4), "v_bits": (2, 4)}
ASKED = Budget(stored_bits=3.1)


def surprising(profile, seed=0):
    """A loss that the curves do not foresee: neighbouring layers make each other's errors worse."""

    def measure(layers):
        lost = 0.0
        for index, layer in layers.items():
            below = layers.get(index - 1, layer)
            lost += math.sin(seed + 7 * index) ** 2 * 4.0**-layer.k.bits * 4.0**-below.v.bits
        return naive_loss(profile, layers) + 30 * lost

    return measure


def watched(measure):
    """The same, and the plans that were measured."""
    seen = []
    return seen, lambda layers: seen.append(dict(layers)) or measure(layers)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), st.floats(2.6, 4), st.integers(1, 30))
def test_never_worse_than_ilp_and_never_over_the_budget(seed, asked, trials):
    profile, budget = curved(4, seed=seed), Budget(stored_bits=asked)
    seen, measure = watched(surprising(profile, seed))
    plan = refine(profile, budget, measure, trials=trials, **LADDERS)
    start = allocate(profile, budget, method="ilp", **LADDERS)
    assert seen[0] == start.layers
    assert len(seen) <= trials
    assert len({short_key(layers) for layers in seen}) == len(seen) == plan.provenance["trials"]
    assert all(Plan.build(profile.model, layers).bits.stored <= asked + 1e-6 for layers in seen)
    losses = [surprising(profile, seed)(layers) for layers in seen]
    assert plan.provenance["measured_loss"] == min(losses) == surprising(profile, seed)(plan.layers)


def test_it_finds_what_the_curves_do_not_know():
    profile = curved(6)
    plan = refine(profile, ASKED, surprising(profile), trials=300, **LADDERS)
    start = allocate(profile, ASKED, method="ilp", **LADDERS)
    assert surprising(profile)(plan.layers) < 0.9 * surprising(profile)(start.layers)
    assert plan.provenance["trials"] < 300, "it ended where no neighbour was better"


def test_provenance_says_how_to_make_it_again():
    profile = curved(4)
    plan = refine(profile, ASKED, surprising(profile), trials=5, seed=3, **LADDERS)
    assert plan == refine(profile, ASKED, surprising(profile), trials=5, seed=3, **LADDERS)
    told = ("method", "score", "seed", "budget", "trials")
    assert [plan.provenance[name] for name in told] == ["search", "loss", 3, {"stored_bits": 3.1}, 5]


def test_without_curves_it_starts_from_the_ranking():
    profile = falling(6)
    seen, measure = watched(lambda layers: -float(layers[5].k.bits))
    plan = refine(profile, Budget(avg_bits=2.6), measure, trials=50, v_bits=(2, 4, 8), group_sizes=(64, 32))
    assert seen[0] == allocate(profile, Budget(avg_bits=2.6)).layers
    assert plan.layers[5].k.bits > seen[0][5].k.bits
    assert plan.bits.nominal <= 2.6


def test_pins_stay_and_a_loss_budget_is_refined_at_the_size_it_gives():
    profile, pins = curved(4, scale=0.01), parse_pins(["-1:k8v8"], make_info(4))
    start = allocate(profile, Budget(max_loss=0.01), method="ilp", pins=pins)
    seen, measure = watched(surprising(profile))
    plan = refine(profile, Budget(max_loss=0.01), measure, trials=20, pins=pins)
    assert len(seen) > 5
    assert all(layers[3] == pins[3] for layers in seen)
    assert plan.bits.stored <= start.bits.stored


def test_an_impossible_budget_measures_nothing():
    with pytest.raises(BudgetError, match=r"reach 2\.5 to 8"):
        refine(curved(4), Budget(stored_bits=2), lambda layers: pytest.fail("measured"))


SETTINGS = {"model": "org/model", "documents": 3}


def interrupted(measure, after):
    turns = count()

    def measured(layers):
        if next(turns) == after:
            raise KeyboardInterrupt
        return measure(layers)

    return measured


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path):
    profile, path = curved(4), tmp_path / "folder" / "search.trials.jsonl"

    def search(measure, *, resume):
        trials = Trials(path, SETTINGS, resume=resume)
        return refine(profile, ASKED, trials.remembered(measure), trials=12, **LADDERS)

    whole = refine(profile, ASKED, surprising(profile), trials=12, **LADDERS)
    with pytest.raises(KeyboardInterrupt):
        search(interrupted(surprising(profile), 7), resume=False)
    with path.open("a") as file:
        file.write('{"plan": "0:k2')
    seen, measure = watched(surprising(profile))
    assert search(measure, resume=True) == whole
    assert len(seen) == 5
    assert search(lambda layers: pytest.fail("measured again"), resume=True) == whole
    assert len(path.read_text().splitlines()) == 1 + 12


def test_a_new_search_forgets_the_old_one(tmp_path):
    path = tmp_path / "trials.jsonl"
    layers = Plan.from_short("0:k2v2", make_info(1)).layers
    Trials(path, SETTINGS, resume=False).remembered(lambda layers: 1.0)(layers)
    assert Trials(path, SETTINGS, resume=True).remembered(lambda layers: 2.0)(layers) == 1
    assert Trials(path, SETTINGS, resume=False).remembered(lambda layers: 2.0)(layers) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is damaged"),
        ("nonsense\n", "it is damaged"),
        ("[1]\n", "it is damaged"),
        (json.dumps({"format": "kvmix-trials/1", **SETTINGS}) + '\n{"plan": 3}\n', "it is damaged"),
        (json.dumps({"format": "kvmix-trials/1", **SETTINGS, "documents": 4}) + "\n", "another documents"),
        (json.dumps({"format": "kvmix-journal/1", **SETTINGS}) + "\n", "another format"),
    ],
)
def test_trials_that_do_not_belong_here(tmp_path, text, message):
    path = tmp_path / "trials.jsonl"
    path.write_text(text)
    with pytest.raises(DocumentError, match=f"cannot go on from it: {message}; drop --resume"):
        Trials(path, SETTINGS, resume=True)
    assert path.read_text() == text


def test_trials_that_cannot_be_written(tmp_path):
    trials = Trials(tmp_path / "trials.jsonl", SETTINGS, resume=False)
    (tmp_path / "trials.jsonl").unlink()
    (tmp_path / "trials.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*; make room, then go on with --resume"):
        trials.remembered(lambda layers: 1.0)(Plan.from_short("0:k2v2", make_info(1)).layers)


def test_keys_name_all_that_a_plan_decides():
    layers = {
        0: LayerPlan(k=TensorPlan(bits=3), v=TensorPlan(bits=2, group_size=32)),
        1: LayerPlan(k=TensorPlan(bits=16), v=TensorPlan(bits=4, group_size="row")),
    }
    assert short_key(layers) == "0:k3v2g32,1:k16v4grow"
