"""Comparisons as a study: what differs between two plans, and between the rankings of two profiles."""

import pytest
from made_up import falling, make_info, make_profile

from kvmix_cli.errors import KvmixError
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TransformSettings
from kvmix_cli.reporting.tables.compare import plans_json
from kvmix_cli.studies.compare import compare_plans, compare_profiles


def test_plans_differ_in_layers_settings_and_bits():
    first = Plan.from_short("0-3:k4v4", make_info(4))
    second = Plan.from_short("0:k4v4,1-3:k2v4", make_info(4), CacheSettings(page=32))
    found = compare_plans(first, second)
    assert (found.layers, found.same) == (4, False)
    assert found.changed == {n: (LayerPlan.of_bits(4, 4), LayerPlan.of_bits(2, 4)) for n in (1, 2, 3)}
    assert found.settings == {"cache.page": (128, 32)}
    assert found.bits["nominal"] == (4.0, 3.25)


def test_a_layer_that_one_plan_does_not_have():
    first = Plan.uniform(make_info(2), 2, 2)
    second = Plan.uniform(make_info(2, stock={1: "sliding_attention"}), 2, 2)
    assert compare_plans(first, second).changed == {1: (LayerPlan.of_bits(2, 2), None)}


def test_a_plan_is_the_same_as_itself():
    plan = Plan.uniform(make_info(4), 2, 2)
    assert compare_plans(plan, plan).same


def test_profiles_rank_layers():
    first, second = falling(4), make_profile([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    keys, values = compare_profiles(first, second).rankings["grad-norm"]
    assert (keys.first, keys.second) == ({0: 1, 1: 2, 2: 3, 3: 4}, {0: 4, 1: 3, 2: 2, 3: 1})
    assert (keys.correlation, values.correlation) == (pytest.approx(-1), pytest.approx(1))
    assert not compare_profiles(first, second).same
    assert compare_profiles(first, first).same


def test_what_cannot_be_compared_is_named():
    with pytest.raises(KvmixError, match=r"a\.yaml and b\.yaml cannot be compared: they share no score"):
        compare_profiles(falling(2), make_profile([1.0, 2.0], name="loss"), ("a.yaml", "b.yaml"))
    with pytest.raises(KvmixError, match="first and second cannot be compared: their models have different layers"):
        compare_profiles(falling(2), falling(3))


def test_transform_codes_and_none_are_named_in_words():
    basis = TransformSettings(basis="basis.safetensors", sha256="0" * 64, exact=2)
    first = Plan.uniform(make_info(2), 2, 2)
    second = Plan.uniform(make_info(2), 2, 2, CacheSettings(transform=basis))
    (words,) = plans_json(compare_plans(first, second))["settings"].values()
    assert words == ["none", "basis basis.safetensors, no frames, 2 exact tokens of each page and KV head"]
