"""The attention function as transformers and other libraries call it."""

import inspect

import pytest
import torch
from architectures import build
from composing import plan_for
from reference import dense_attention
from teaching import ids
from torch import nn
from transformers import MllamaForCausalLM, MllamaTextConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvmix_cli.cache.attention import kvmix_attention
from kvmix_cli.cache.handle import Handle
from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.errors import CacheError, PlanError, PolicyError
from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TensorPlan
from kvmix_cli.plan.windows import Recent


class Module(nn.Module):
    """An attention module as far as attention functions look at it."""

    num_key_value_groups = 2

    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, 9, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]


def handles():
    """Return a layer's keys and values with packed pages, and the plain tensors they stand for."""
    model = build("llama")
    cache = MixedCache.from_plan(plan_for(model, {}, 8, 8), model.config)
    with torch.no_grad():
        model(ids(150), past_key_values=cache)
    return cache.layers[0].keys, cache.layers[0].values


def test_arguments_have_the_order_of_sdpa(states):
    names = [list(inspect.signature(each).parameters) for each in (kvmix_attention, sdpa_attention_forward)]
    assert names[0][:8] == names[1][:8]
    assert names[0][5:8] == ["dropout", "scaling", "is_causal"]
    positional = kvmix_attention(Module(), *states, None, 0.0, 0.3)[0]
    named = kvmix_attention(Module(), *states, None, scaling=0.3, dropout=0.0)[0]
    torch.testing.assert_close(positional, named)
    torch.testing.assert_close(positional, sdpa_attention_forward(Module(), *states, None, 0.0, 0.3)[0])


def test_dropout_is_applied_over_handles():
    key, value = handles()
    query = torch.randn(2, 4, 1, 16, dtype=torch.float64)
    torch.manual_seed(0)
    got = kvmix_attention(Module(), query, key, value, None, 0.5, 0.25)[0]
    torch.manual_seed(0)
    want = sdpa_attention_forward(Module(), query, key.clone(), value.clone(), None, 0.5, 0.25)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("module", "argument"), [(Module(is_causal=False), None), (Module(), False)])
@pytest.mark.parametrize("queries", [1, 3, 9])
def test_attention_that_is_not_causal_sees_every_key(states, module, argument, queries):
    query, key, value = states
    query = query[:, :, :queries]
    everything = torch.ones(1, 1, queries, 9, dtype=torch.bool)
    got = kvmix_attention(module, query, key, value, None, 0.0, 0.25, argument)[0]
    want = dense_attention(query, key, value, 0.25, everything).transpose(1, 2)
    torch.testing.assert_close(got, want)


def test_more_queries_than_keys_are_attended_by_sdpa():
    key, value = handles()
    query = torch.randn(2, 4, 200, 16, dtype=torch.float64)
    mask = torch.ones(1, 1, 200, 150, dtype=torch.bool)
    got = kvmix_attention(Module(), query, key, value, mask, 0.0, 0.25)[0]
    torch.testing.assert_close(got, dense_attention(query, key.clone(), value.clone(), 0.25, mask).transpose(1, 2))


def test_head_wise_presses_are_refused():
    """kvpress masks single keys of single heads by writing other keys over them, which a handle cannot hold."""
    key, value = handles()
    query = torch.randn(2, 4, 1, 16, dtype=torch.float64)
    module = Module()
    module.layer_idx = 3
    module.masked_key_indices = tuple(torch.zeros(3, 4, dtype=torch.long))
    with pytest.raises(PolicyError, match=r"layer 3: a head-wise press of kvpress .* unquantized cache"):
        kvmix_attention(module, query, key, value, None, 0.0, 0.25)
    with pytest.raises(CacheError, match="head-wise presses of kvpress"):
        key[module.masked_key_indices] = query[0, 0, 0]
    plain = key.clone(), value.clone()
    assert kvmix_attention(module, query, *plain, None, 0.0, 0.25)[0].isfinite().all()


def test_a_handle_without_a_layer_is_read_as_it_is():
    key, value = handles()
    assert isinstance(key, Handle)
    query = torch.randn(2, 4, 1, 16, dtype=torch.float64)
    got = kvmix_attention(Module(), query, key, value, None)[0]
    torch.testing.assert_close(got, dense_attention(query, key.clone(), value.clone(), 0.25).transpose(1, 2))


@pytest.fixture(scope="module")
def mllama():
    config = MllamaTextConfig(
        vocab_size=199,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        cross_attention_layers=[1],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return MllamaForCausalLM(config).double().eval()


def mllama_plan(model, layers):
    pair = LayerPlan(k=TensorPlan(bits=16), v=TensorPlan(bits=16))
    settings = CacheSettings(page=16, sink=4, group_size=16, window=Recent(tokens=10))
    return Plan.build(model_info(model.config, "test"), dict.fromkeys(layers, pair), settings)


@pytest.mark.parametrize("implementation", ["sdpa", "kvmix"])
@pytest.mark.parametrize("sees_image", [True, False])
def test_cross_attention_layers_keep_their_stock_cache(mllama, implementation, sees_image):
    info = model_info(mllama.config, "test")
    assert (info.stock, info.quantizable) == ({1: "cross_attention"}, [0, 2, 3])
    mllama.set_attn_implementation(implementation)
    caches = (
        MixedCache.from_plan(mllama_plan(mllama, info.quantizable), mllama.config),
        unquantized_cache(mllama.config),
    )
    image = torch.randn(2, 30, 64, dtype=torch.float64)

    def seen(queries, states):
        if not sees_image:
            return {}
        options = {"cross_attention_mask": torch.zeros(2, 1, queries, 30, dtype=torch.float64)}
        options["full_text_row_masked_out_mask"] = torch.ones(2, 1, queries, 1, dtype=torch.float64)
        return options | {"cross_attention_states": states}

    with torch.no_grad():
        for cache in caches:
            mllama(ids(40), past_key_values=cache, **seen(40, image))
        got, want = (mllama(ids(1), past_key_values=cache, **seen(1, None)).logits for cache in caches)
    torch.testing.assert_close(got, want)


def test_a_plan_for_a_cross_attention_layer_is_refused(mllama):
    info = model_info(mllama.config, "test")
    plan = mllama_plan(mllama, info.quantizable)
    plan = plan.model_copy(update={"layers": {**plan.layers, 1: plan.layers[0]}})
    with pytest.raises(PlanError, match=r"no full attention: 1 \(cross_attention\); leave them out"):
        MixedCache.from_plan(plan, mllama.config)
