"""Transform codes for serving engines: plans of moments that count all pairs of a query and a token."""

import pytest
from made_up import make_info
from with_moments import model_moments, profile_with_moments, with_coded

from kvmix_cli.allocation import Budget, allocate, make_bases
from kvmix_cli.plan import CacheSettings
from kvmix_cli.plan.engine_blocks import losses_in_blocks
from kvmix_cli.plan.windows import NoWindow

ENGINE = {"page": 128, "sink": 1, "window": "none", "scale_dtype": "float16"}
OURS = {"page": 128, "sink": 4, "window": "recent:128", "scale_dtype": "float16"}
INFO = make_info(3, head_dim=32)
PROFILE = profile_with_moments(INFO, setup=ENGINE)
BASIS = make_bases(PROFILE, model_moments(INFO))


def test_a_plan_of_all_pairs_is_one_that_an_engine_holds_whole():
    plan = allocate(PROFILE, Budget(avg_bits=3), basis=BASIS)
    assert (plan.cache.sink, plan.cache.window, plan.cache.transform.exact) == (1, NoWindow(), 0)
    assert losses_in_blocks(plan) == []
    assert plan.provenance["metric_window"] == "none"


def test_its_loss_is_corrected_by_what_an_engine_loses():
    coded = with_coded(PROFILE, {0: 3.0})
    plain, corrected = (allocate(each, Budget(avg_bits=3), basis=BASIS) for each in (PROFILE, coded))
    assert corrected.provenance["predicted_loss"] == pytest.approx(3 * plain.provenance["predicted_loss"])
    assert corrected.layers == plain.layers and corrected.cache.transform.exact == 0


def test_settings_that_are_given_are_kept():
    plan = allocate(PROFILE, Budget(avg_bits=3), basis=BASIS, cache=CacheSettings(sink=8), exact=2)
    assert (plan.cache.sink, plan.cache.window.short, plan.cache.transform.exact) == (8, "recent:128", 2)


def test_other_moments_and_methods_keep_sink_and_window():
    ours = profile_with_moments(INFO, setup=OURS)
    plan = allocate(ours, Budget(avg_bits=3), basis=BASIS)
    assert (plan.cache, plan.provenance["metric_window"]) == (
        CacheSettings(transform=plan.cache.transform),
        "recent:128",
    )
    assert plan.cache.transform.exact == 1
    assert allocate(PROFILE, Budget(avg_bits=3), method="rank").cache == CacheSettings()
