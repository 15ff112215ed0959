"""Layers with KV heads of their own: files, checksums, sizes, budgets."""

import pytest

from kvmix_cli.allocation import Budget, allocate
from kvmix_cli.errors import PlanError
from kvmix_cli.plan import CacheSettings, HeadGeometry, LayerPlan, ModelInfo, Plan
from kvmix_cli.plan.sizes import mean_bits
from kvmix_cli.profile import Calibration, LayerScore, Profile, Score, TensorScore

SMALL = HeadGeometry(kv_heads=2, key_dim=64, value_dim=32)
LARGE = HeadGeometry(kv_heads=4, key_dim=128, value_dim=64)
HEADS = {0: SMALL, 1: LARGE, 3: SMALL}


@pytest.fixture
def info():
    return ModelInfo.of_heads(HEADS, id="m", layers=4, stock={2: "sliding_attention"})


def profile_of(info, means):
    score = {layer: LayerScore(k=TensorScore(mean=mean), v=TensorScore(mean=mean)) for layer, mean in means.items()}
    text = Calibration(source="text", sha256="0", samples=1, seq_len=2, seed=0, tokens=2)
    return Profile(model=info, scores={"grad-norm": Score(seconds=1, calibration=text, layers=score)})


def test_every_layer_has_its_heads(info):
    assert {layer: info.heads(layer) for layer in info.quantizable} == HEADS
    assert info.geometries == {SMALL: [0, 3], LARGE: [1]}
    assert (info.kv_heads, info.head_dim, info.value_dim, info.other_heads) == (2, 64, 32, {1: LARGE})


def test_equal_models_are_written_equally(info):
    again = ModelInfo(
        id="m",
        layers=4,
        kv_heads=2,
        head_dim=64,
        value_dim=32,
        other_heads={3: SMALL, 1: LARGE},
        stock={2: "sliding_attention"},
    )
    assert again == info
    assert again.model_dump() == info.model_dump()


def test_layers_that_are_alike_are_written_as_before():
    alike = HeadGeometry(kv_heads=2, key_dim=64, value_dim=64)
    info = ModelInfo.of_heads({0: alike, 1: alike}, id="m", layers=2)
    assert info == ModelInfo(id="m", layers=2, kv_heads=2, head_dim=64)
    assert set(info.model_dump()) == {"id", "revision", "layers", "kv_heads", "head_dim", "config_sha256", "stock"}


def test_heads_survive_a_file(info, tmp_path):
    plan = Plan.uniform(info, 2, 4)
    loaded = Plan.load(plan.save(tmp_path / "plan.yaml"))
    assert loaded == plan
    assert loaded.sha256 == plan.sha256
    profile = profile_of(info, {0: 1.0, 1: 2.0, 3: 3.0})
    assert Profile.load(profile.save(tmp_path / "profile.yaml")).sha256 == profile.sha256


@pytest.mark.parametrize("layer", [2, 4, -1])
def test_heads_of_a_layer_that_has_none_are_a_fault(layer):
    with pytest.raises(ValueError, match=f"layer {layer} cannot have heads to plan for"):
        ModelInfo(id="m", layers=4, kv_heads=1, head_dim=64, other_heads={layer: SMALL}, stock={2: "dummy"})


def test_a_plan_for_other_heads_is_refused(info):
    other = ModelInfo.of_heads(HEADS | {1: SMALL}, id="other", layers=4, stock={2: "sliding_attention"})
    plan = Plan.uniform(info, 2, 2)
    plan.check_model(info)
    with pytest.raises(PlanError, match=r"layer 1 has KV heads of 4 x 128 \(values 64\) against 2 x 64 \(values 32\)"):
        plan.check_model(other)


def test_larger_layers_count_for_more(info):
    layers = {0: LayerPlan.of_bits(2, 2), 1: LayerPlan.of_bits(4, 8), 3: LayerPlan.of_bits(2, 2)}
    small, large = 2 * (64 + 32), 4 * (128 + 64)
    nominal = (2 * 2 * small + 4 * (4 * 128) + 8 * (4 * 64)) / (2 * small + large)
    assert mean_bits(layers, CacheSettings(), info, "nominal") == pytest.approx(nominal)
    plan = Plan.build(info, layers)
    assert plan.unquantized_bytes(10, 3, 2) == 3 * 10 * 2 * (2 * small + large)


@pytest.mark.parametrize("method", ["rank", "ilp", "cut", "uniform", "random"])
@pytest.mark.parametrize("budget", [{"avg_bits": 3.2}, {"stored_bits": 3.9}, {"memory": 2.5e6, "context": 4096}])
def test_every_method_keeps_to_a_budget(info, method, budget):
    profile = profile_of(info, {0: 1.0, 1: 2.0, 3: 3.0})
    plan = allocate(profile, Budget(**budget), method=method, k_bits=[2, 3, 4], v_bits=[2, 3, 4])
    if "memory" in budget:
        assert plan.cache_bytes(4096).total <= 2.5e6
    else:
        (limit,) = budget.values()
        assert getattr(plan.bits, "nominal" if "avg_bits" in budget else "stored") <= limit + 1e-6


def test_a_share_raises_as_many_layers_as_it_says(info):
    profile = profile_of(info, {0: 1.0, 1: 3.0, 3: 2.0})
    plan = allocate(profile, Budget(share=1 / 3), method="rank", k_bits=[2, 3], v_bits=[2, 4])
    assert {layer: each.short for layer, each in plan.layers.items()} == {0: "k2v2", 1: "k3v4", 3: "k2v2"}
