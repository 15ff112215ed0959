"""The bytes that a plan predicts are those of the tensors, whatever it transforms and sorts."""

import pytest
import torch
from architectures import build
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import layer_plans, sortings, transforms

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.transforms import Transforms
from kvmix_cli.plan.windows import NoWindow, Recent, Rpc

windows = st.sampled_from([NoWindow(), Recent(tokens=20), Rpc()])


def without_files(given):
    """The transforms that need no file of a model."""
    return Transforms(**{kind: tuple(step for step in getattr(given, kind) if not needs_file(step)) for kind in "kv"})


def needs_file(step):
    return bool(getattr(step, "matrix", None) or getattr(step, "means", None))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:kvmix. .*falling back")
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_predicted_bytes_are_measured_bytes(data):
    """All but the statistics of one token, the one that is decoded."""
    model = build("llama", torch.bfloat16, wide=True)
    model.set_attn_implementation("kvmix")
    info = model_info(model.config, "test")
    axes = {
        "transforms": data.draw(st.none() | transforms.map(without_files)),
        **data.draw(sortings(16, info.head_dim)),
    }
    cache_settings = CacheSettings(page=16, sink=4, group_size=16, window=data.draw(windows), **axes)
    plan = Plan.build(info, {layer: data.draw(layer_plans) for layer in info.quantizable}, cache_settings)
    context = data.draw(st.integers(70, 600))
    cache = MixedCache.from_plan(plan, model.config)
    with torch.no_grad():
        model(torch.arange(2 * context).view(2, -1) % 90, past_key_values=cache)
        model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
    one_more = 2 * plan.unquantized_bytes(1)
    policy = cache_settings.tokens
    statistics = (
        0 if policy is None else 2 * 4 * policy.statistics.numbers(info.kv_heads, context) + 2 * bool(policy.images)
    )
    predicted = plan.cache_bytes(context, batch=2).total
    assert predicted + one_more <= cache.nbytes <= predicted + one_more + 2 * statistics * len(plan.layers)
