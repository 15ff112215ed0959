"""Command lines that lead to a plan which a serving engine holds."""

from pathlib import Path

import pytest
from made_up import make_info
from with_moments import save_with_moments

from kvmix_cli.plan import Plan

ENGINE = {"page": 128, "sink": 1, "window": "none", "scale_dtype": "float16"}
OURS = {"page": 128, "sink": 4, "window": "recent:128", "scale_dtype": "float16"}
FILE = Path("profiles/org--model/profile.yaml")


@pytest.mark.parametrize(
    ("setup", "options", "said"),
    [
        (ENGINE, (), ()),
        (OURS, (), ()),
        (OURS, ("--window", "none"), ("window none instead of recent:128", "--window none, into a file of its own")),
        (ENGINE, ("--window", "recent:64"), ("window recent:64 instead of none",)),
    ],
)
def test_a_window_other_than_the_metrics_is_said(kvmix, setup, options, said):
    save_with_moments(FILE, make_info(3, head_dim=32), setup=setup)
    ran = kvmix("allocate", "--avg-bits", 3, "--name", "mine", *options)
    assert ran.code == 0
    notices = [line for line in ran.err.splitlines() if "fisher-metric" in line]
    assert len(notices) == len(said) and all(part in line for part, line in zip(said, notices, strict=True))
    cache = Plan.load(FILE.parent / "plans" / "mine.yaml").cache
    assert cache.window.short == (options[1] if options else setup["window"])


def test_an_exported_plan_of_transform_codes_has_its_basis_beside_it(kvmix):
    save_with_moments(FILE, make_info(3, head_dim=32), setup=OURS)
    assert kvmix("allocate", "--avg-bits", 3, "--name", "mine").code == 0
    ran = kvmix("export", "mine", "--to", "vllm-plugin", "--out", "else where/engine.yaml")
    assert ran.code == 0
    said = [line.removeprefix("kvmix: not held: ") for line in ran.err.splitlines() if "not held" in line]
    assert said == [
        "no sink of 4",
        "no window (recent:128)",
        "no exact tokens (1 a page)",
        "the window that the metric of its codes leaves out (recent:128) is coded, too",
    ]
    plan = Plan.load("else where/engine.yaml")
    assert (plan.cache.sink, plan.cache.window.short, plan.cache.transform.exact) == (0, "none", 0)
    assert (Path("else where") / plan.cache.transform.basis).is_file()
    told = kvmix("export", "mine", "--to", "vllm-plugin", "--json").json
    assert told["not_held"] == said and told["measured"] is None
    assert told["stored_bits"] < told["plan_stored_bits"], "no exact tokens"


def test_inspect_says_which_pairs_a_profile_counts(kvmix):
    for setup, said in ((ENGINE, True), (OURS, False)):
        save_with_moments(FILE, make_info(3, head_dim=32), setup=setup)
        assert ("predictions, all pairs of them, for engines" in kvmix("inspect", FILE).out) == said
