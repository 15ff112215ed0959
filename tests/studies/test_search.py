"""The search as a study: measured losses are kept in a journal, and an interrupted search goes on from there."""

import json
from itertools import count

import pytest
from curves import curve, curved, make_score, surprising
from evaluating import tiny
from made_up import make_info
from pydantic import TypeAdapter

from kvmix_cli.allocation import Budget, refine
from kvmix_cli.errors import BudgetError, DocumentError, StateError
from kvmix_cli.journal import Journal
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TensorPlan
from kvmix_cli.plan.windows import Recent
from kvmix_cli.profile import Calibration, Profile
from kvmix_cli.studies.search import FORMAT, Trial, layers_key, remembered, search

WIDTHS = {"k_bits": (2, 3, 4), "v_bits": (2, 4)}
ASKED = Budget(stored_bits=3.1)
SETTINGS = {"format": FORMAT, "model": "org/model", "documents": 3}
LAYERS = Plan.from_short("0:k2v2", make_info(1)).layers


@pytest.fixture
def open_journal(tmp_path):
    """Open the journal of a search; with `resume` the one that is there."""

    def opened(*, resume, settings=SETTINGS):
        return Journal(tmp_path / "folder" / "search.trials.jsonl", settings, TypeAdapter(Trial), resume=resume)

    return opened


def watched(measure):
    """The same measurement, and the plans that were measured."""
    seen = []
    return seen, lambda layers: seen.append(dict(layers)) or measure(layers)


def interrupted(measure, after):
    turns = count()

    def measured(layers):
        if next(turns) == after:
            raise KeyboardInterrupt
        return measure(layers)

    return measured


def test_an_interrupted_search_goes_on_where_it_stopped(open_journal):
    profile = curved(4)

    def refined(measure, *, resume):
        with open_journal(resume=resume) as record:
            return refine(profile, ASKED, remembered(measure, record), trials=12, **WIDTHS)

    whole = refine(profile, ASKED, surprising(profile), trials=12, **WIDTHS)
    with pytest.raises(KeyboardInterrupt):
        refined(interrupted(surprising(profile), 7), resume=False)
    path = open_journal(resume=True)
    path.close()
    with path.path.open("a") as file:
        file.write('{"plan": "0:k2')
    seen, measure = watched(surprising(profile))
    assert refined(measure, resume=True) == whole
    assert len(seen) == 5
    assert refined(lambda layers: pytest.fail("measured again"), resume=True) == whole
    assert len(path.path.read_text().splitlines()) == 1 + 12


def test_a_new_search_forgets_the_old_one(open_journal):
    for resume, measured, expected in ((False, 1.0, 1.0), (True, 2.0, 1.0), (False, 2.0, 2.0)):
        with open_journal(resume=resume) as record:
            assert remembered(lambda layers, loss=measured: loss, record)(LAYERS) == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"plan": 3, "loss": 1.0}'], "line 2 is damaged"),
        (['{"plan": "0:k2v2"}'], "line 2 is damaged"),
        (['{"plan": "0:k2v2", "loss": NaN}'], "line 2 is damaged"),
        (['{"plan": "0:k2v2", "loss": 1.0}', "[" * 100_000], "line 3 is damaged"),
    ],
)
def test_losses_that_are_damaged(open_journal, tmp_path, lines, message):
    open_journal(resume=False).close()
    path = tmp_path / "folder" / "search.trials.jsonl"
    text = path.read_text() + "".join(line + "\n" for line in lines)
    path.write_text(text)
    with pytest.raises(DocumentError, match=message):
        open_journal(resume=True)
    assert path.read_text() == text


def test_losses_that_were_measured_under_other_settings(open_journal):
    open_journal(resume=False).close()
    with pytest.raises(DocumentError, match="documents was 3 and is now 4; leave out --resume to start over"):
        open_journal(resume=True, settings={**SETTINGS, "documents": 4})


def test_keys_name_all_that_a_plan_decides():
    layers = {
        0: LayerPlan(k=TensorPlan(bits=3), v=TensorPlan(bits=2, group_size=32)),
        1: LayerPlan(k=TensorPlan(bits=16), v=TensorPlan(bits=4, group_size="row")),
    }
    assert layers_key(layers) == "0:k3v2g32,1:k16v4grow"


@pytest.fixture
def profile():
    """A profile of builtin:tiny whose curves are made up: every layer matters half as much as the one before."""
    info = tiny().info
    k, v = ([curve(0.1 / 2**layer) for layer in range(info.layers)] for _ in "kv")
    calibration = Calibration(source="builtin", sha256="ab", samples=1, seq_len=192, seed=0, tokens=192)
    score = make_score(k, v).model_copy(update={"calibration": calibration})
    return Profile(model=info, scores={"loss": score})


OPTIONS = {"cache": CacheSettings(page=32, group_size=32, window=Recent(tokens=32))}


@pytest.mark.slow
def test_it_is_called_from_python_and_prints_nothing(profile, tmp_path, capsys):
    journal = tmp_path / "trials.jsonl"
    plan = search(profile, Budget(stored_bits=3.5), OPTIONS, tiny, journal=journal, trials=3, samples=1)
    head, *trials = map(json.loads, journal.read_text().splitlines())
    assert plan.provenance["measured_loss"] == min(trial["loss"] for trial in trials)
    assert (head["format"], head["calibration"]["samples"], len(trials)) == (FORMAT, 1, 3)
    assert capsys.readouterr() == ("", "")


def test_no_two_searches_write_one_journal(profile, tmp_path):
    path = tmp_path / "trials.jsonl"
    with (
        Journal(path, SETTINGS, TypeAdapter(Trial), resume=False),
        pytest.raises(StateError, match="another process is writing"),
    ):
        search(profile, Budget(stored_bits=3.5), OPTIONS, tiny, journal=path, trials=1, samples=1)


def test_a_budget_out_of_reach_loads_no_model(profile):
    with pytest.raises(BudgetError, match="no plan has 1 stored bits"):
        search(profile, Budget(stored_bits=1), OPTIONS, lambda: pytest.fail("loaded"))
