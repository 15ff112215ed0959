"""Plans for our plugin of vLLM: as the engine holds them, with what is lost in words and in bits."""

import pytest
import torch
from architectures import build
from coding import coded_plan
from made_up import make_info

from kvmix_cli.cache.blocks import bytes_per_token
from kvmix_cli.cache.in_engine import TokenwiseCache
from kvmix_cli.errors import ExportError
from kvmix_cli.export import TARGETS
from kvmix_cli.export.plugin import with_measured_loss
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TensorPlan
from kvmix_cli.plan.engine_blocks import (
    held_sink,
    left_out,
    losses_in_blocks,
    measured_loss,
    stored_bits,
    without_full_precision,
)
from kvmix_cli.plan.layers import HeadGroup
from kvmix_cli.plan.transforms import Balance, Transforms
from kvmix_cli.plan.windows import NoWindow

TARGET = TARGETS["vllm-plugin"]


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def bits_of_blocks(plan):
    """Stored bits, from the bytes that an engine is told."""
    heads = {index: plan.model.heads(index) for index in plan.layers}
    nbytes = sum(each.kv_heads * bytes_per_token(plan, index, 128, torch.bfloat16) for index, each in heads.items())
    return 8 * nbytes / sum(each.token_elements for each in heads.values())


def test_a_plan_loses_what_stays_in_full_precision():
    plan = Plan.from_short("0-3:k4v2,4-7:k16v4", make_info(), CacheSettings(group_size=32))
    found = TARGET.export(plan)
    assert (found.plan.cache.sink, found.plan.cache.window) == (0, NoWindow())
    assert found.plan.layers == plan.layers
    assert found.losses == tuple(losses_in_blocks(plan))
    assert losses_in_blocks(found.plan) == ["keys of 4 layers in groups along channels, not tokens"]
    assert (found.formats, found.rounded) == (None, [])


@pytest.mark.parametrize(
    "cache", [CacheSettings(group_size=32), CacheSettings(group_size="row"), CacheSettings(group_size=128)]
)
def test_stored_bits_are_those_of_the_engines_blocks(cache):
    plan = Plan.from_short("0-3:k4v2,4-6:k16v3,7:k1v8", make_info(8, head_dim=80), cache)
    assert TARGET.export(plan).stored_bits == stored_bits(plan) == bits_of_blocks(plan)


def test_of_transform_codes_no_token_stays_exact(llama, tmp_path):
    plan = coded_plan(llama, tmp_path, exact=2)
    found = TARGET.export(plan)
    assert (plan.cache.transform.exact, found.plan.cache.transform.exact) == (2, 0)
    assert "no exact tokens (2 a page)" in found.losses
    assert found.stored_bits == bits_of_blocks(found.plan)


def test_the_file_says_what_was_measured_of_it(tmp_path):
    made = with_measured_loss(TARGET.export(Plan.uniform(make_info(4), 4, 4)), "builtin", 766, 0.026, 0.0014)
    (tmp_path / "plan.yaml").write_text(made.text)
    plan = Plan.load(tmp_path / "plan.yaml")
    assert plan == made.plan
    found = measured_loss(plan)
    assert (found.text, found.tokens, found.kl, found.plan_kl) == ("builtin", 766, 0.026, 0.0014)
    changed = {**plan.layers, 0: LayerPlan.of_bits(2, 2)}
    other = Plan.build(plan.model, changed, plan.cache, plan.provenance)
    assert measured_loss(other) is None, "nothing was measured of another plan"
    assert measured_loss(plan.model_copy(update={"provenance": {"in_engine": {"kl": "much"}}})) is None


@pytest.mark.parametrize(("window", "said"), [(None, None), ("none", None), ("recent:128", "recent:128")])
def test_codes_of_a_metric_with_a_window_are_told(llama, tmp_path, window, said):
    coded = coded_plan(llama, tmp_path)
    plan = coded.model_copy(update={"provenance": {} if window is None else {"metric_window": window}})
    assert left_out(plan) == said
    losses = [line for line in TARGET.export(plan).losses if "metric" in line]
    assert losses == (
        [] if said is None else [f"the window that the metric of its codes leaves out ({said}) is coded, too"]
    )
    affine = Plan.uniform(make_info(4), 4, 4)
    assert left_out(affine.model_copy(update={"provenance": plan.provenance})) is None


def test_what_no_block_can_hold_is_refused():
    info = make_info(2)
    balanced = Plan.uniform(info, 4, 4, CacheSettings(transforms=Transforms(k=(Balance(),))))
    four, two = (TensorPlan(bits=bits) for bits in (4, 2))
    layer = LayerPlan(k=four, v=four, head_groups=(HeadGroup(heads=(1,), k=two, v=two),))
    by_head = Plan.build(info, {0: layer, 1: LayerPlan(k=four, v=four)})
    for plan, said in ((balanced, "its cache has transforms"), (by_head, "layers 0 store KV heads in groups")):
        with pytest.raises(ExportError, match=f"^vllm-plugin cannot express this plan: .*{said}"):
            TARGET.export(plan)
    with pytest.raises(ExportError, match="holds a plan at its own widths: leave out --format fp8"):
        TARGET.export(Plan.uniform(info, 4, 4), "fp8")


def test_a_plan_without_full_precision_is_left_as_it_is():
    plan = Plan.uniform(make_info(4), 4, 4, CacheSettings(sink=0, window=NoWindow()))
    assert without_full_precision(plan) == plan


def test_transform_codes_for_engines_keep_their_sink(llama, tmp_path):
    coded = coded_plan(llama, tmp_path, exact=0)
    cache = coded.cache.model_copy(update={"sink": 2, "window": NoWindow(), "page": 64})
    plan = Plan.build(coded.model, coded.layers, cache)
    found = TARGET.export(plan)
    assert (held_sink(plan), found.plan.cache.sink, found.losses) == (2, 2, ())
    without = Plan.build(plan.model, plan.layers, cache.model_copy(update={"sink": 0}))
    room = found.stored_bits - TARGET.export(without).stored_bits
    assert room == pytest.approx(16 * 2 / 64, abs=8 / (2 * plan.model.head_dim)), "whole bytes a token and head"
    given = torch.randn(2, 1, 2, 30, 16, dtype=torch.float64)
    keys, values = TokenwiseCache.from_plan(plan).update(*given, 0)
    for held, states in ((keys, given[0]), (values, given[1])):
        assert torch.equal(held[:, :, :2], states[:, :, :2]) and not torch.equal(held[:, :, 2], states[:, :, 2])
