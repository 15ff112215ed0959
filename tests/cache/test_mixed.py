"""Counting, bytes, and plans that do not fit."""

import pytest
import torch
from architectures import build
from composing import AXES, plan_for
from kvmix_kernels.pages import Packed
from kvmix_kernels.runtime.native import library
from teaching import ids
from transformers import MistralConfig

from kvmix_cli.cache.baselines.named import named_cache
from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.cache.packing import PolicyFunctions, packing_of
from kvmix_cli.cache.sizes import cache_nbytes
from kvmix_cli.errors import CacheError, PlanError, QuantizationError
from kvmix_cli.models.geometry import stock_layers
from kvmix_cli.plan import CacheSettings, ModelInfo, Plan, TensorPlan
from kvmix_cli.plan.channels import ChannelGroup, ChannelPolicy
from kvmix_cli.plan.forms import storage_forms
from kvmix_cli.plan.tokens import TokenPolicy
from kvmix_cli.plan.windows import Recent, Rpc

INFO = ModelInfo(id="test", layers=4, kv_heads=2, head_dim=16)


@pytest.mark.slow
@pytest.mark.parametrize("window", [Recent(tokens=0), Recent(tokens=50), Rpc()])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
def test_predicted_bytes_are_measured_bytes(window, bits):
    model = build("llama", torch.bfloat16)
    settings = CacheSettings(page=32, sink=4, group_size=16, window=window)
    plan = Plan.uniform(INFO, bits, bits, settings)
    cache = MixedCache.from_plan(plan, model.config)
    with torch.no_grad():
        model(torch.ones(3, 700, dtype=torch.long), past_key_values=cache)
        model(torch.ones(3, 1, dtype=torch.long), past_key_values=cache)
    one_more = 3 * plan.unquantized_bytes(1)
    assert cache.nbytes - one_more == plan.cache_bytes(700, batch=3).total


def test_attended_counts_pairs():
    model = build("llama", torch.float32)
    settings = CacheSettings(page=16, sink=4, group_size=16, window=Recent(tokens=0))
    cache = MixedCache.from_plan(Plan.uniform(INFO, 2, 2, settings), model.config)
    with torch.no_grad():
        model(torch.ones(2, 100, dtype=torch.long), past_key_values=cache)
        assert cache.attended.total == 4 * 2 * 100 * 101 / 2
        assert cache.attended.share == 0
        cache.attended.reset()
        model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
    assert cache.attended.total == 4 * 2 * 101
    assert cache.attended.share == pytest.approx(96 / 101)


def test_half_quantized_layers_count_half():
    model = build("llama", torch.float32)
    settings = CacheSettings(page=16, sink=0, group_size=16, window=Recent(tokens=0))
    cache = MixedCache.from_plan(Plan.uniform(INFO, 2, 16, settings), model.config)
    with torch.no_grad():
        model(torch.ones(1, 159, dtype=torch.long), past_key_values=cache)
        cache.attended.reset()
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    assert cache.attended.share == pytest.approx(144 / 160 / 2)


@pytest.mark.parametrize("native", [True, False])
def test_the_kvmix_attention_never_dequantizes_the_whole_cache(monkeypatch, native):
    import kvmix_kernels.attend
    from kvmix_kernels.attend import naive

    if not native:
        monkeypatch.setattr(kvmix_kernels.attend, "library", lambda: None)
    monkeypatch.setattr(naive, "TOKENS_PER_TILE", 64)
    sizes = []
    read = Packed.read
    monkeypatch.setattr(
        Packed, "read", lambda self, start, stop, dtype: sizes.append(stop - start) or read(self, start, stop, dtype)
    )
    model = build("llama", torch.float32)
    model.set_attn_implementation("kvmix")
    cache = MixedCache.from_plan(Plan.uniform(INFO, 2, 2), model.config)
    with torch.no_grad():
        model(torch.ones(1, 900, dtype=torch.long), past_key_values=cache)
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    assert set(sizes) == (set() if native and library() is not None else {64})


def test_a_cache_is_made_for_a_model_as_for_its_configuration():
    model = build("llama", torch.float32)
    caches = [MixedCache.from_plan(Plan.uniform(INFO, 2, 2), each) for each in (model, model.config)]
    assert [type(layer) for layer in caches[0].layers] == [type(layer) for layer in caches[1].layers]


def test_nan_names_the_layer():
    model = build("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[3, 3] = torch.nan
    cache = MixedCache.from_plan(Plan.uniform(INFO, 2, 2), model.config)
    with pytest.raises(QuantizationError, match="layer 2 values: NaN or Inf"), torch.no_grad():
        model(torch.ones(1, 900, dtype=torch.long), past_key_values=cache)


def test_stock_layers_are_found_and_counted():
    model = build("gemma2", torch.float32)
    assert stock_layers(model.config) == {0: "sliding_attention", 2: "sliding_attention"}
    cache = unquantized_cache(model.config)
    with torch.no_grad():
        model(torch.ones(1, 100, dtype=torch.long), past_key_values=cache)
    assert cache_nbytes(cache) == 2 * 2 * 16 * 4 * (2 * 100 + 2 * 23)


SETTINGS = CacheSettings(page=16, sink=4, group_size=16, window=Recent(tokens=0))
AXES_WITH_STATE = [{}, AXES["all of them"], AXES["recency"], AXES["everything"]]


@pytest.mark.slow
@pytest.mark.parametrize("axes", AXES_WITH_STATE, ids=["pages", "all of them", "recency", "everything"])
@pytest.mark.parametrize("tokens", [5, 200])
def test_a_refused_update_leaves_the_cache_as_it_was(axes, tokens):
    """Another batch size is refused before anything is counted or stored, and the cache goes on as if it never came."""
    model = build("llama", wide=True)
    model.set_attn_implementation("kvmix")
    plan = plan_for(model, axes, 4, 4)
    refused, straight = (MixedCache.from_plan(plan, model.config) for _ in range(2))
    with torch.no_grad():
        for cache in (refused, straight):
            model(ids(100), past_key_values=cache)
            model(ids(1), past_key_values=cache)
        before = refused.nbytes, refused.attended.total
        with pytest.raises(
            CacheError, match=r"layer 0 holds keys of 2 sequences .* and was given 3 sequences .*; use a new"
        ):
            model(ids(tokens, batch=3), past_key_values=refused)
        assert (refused.nbytes, refused.attended.total) == before
        assert {refused.get_seq_length(layer) for layer in range(4)} == {101}
        assert all(store.length == 101 for layer in refused.layers for store in layer.stores)
        logits = [model(ids(120, seed=1), past_key_values=cache).logits for cache in (refused, straight)]
        torch.testing.assert_close(*logits)
        torch.testing.assert_close(*[model(ids(1), past_key_values=cache).logits for cache in (refused, straight)])


@pytest.mark.parametrize("shape", [(2, 4, 3, 16), (2, 2, 3, 32)])
def test_other_heads_are_refused(shape):
    config = build("llama", torch.float32).config
    cache = MixedCache.from_plan(Plan.uniform(INFO, 4, 4, SETTINGS), config)
    cache.update(torch.ones(2, 2, 30, 16), torch.ones(2, 2, 30, 16), 1)
    with pytest.raises(
        CacheError, match=f"layer 1 holds .* and was given 2 sequences x {shape[1]} KV heads x {shape[3]}"
    ):
        cache.update(torch.ones(shape), torch.ones(shape), 1)
    assert cache.get_seq_length(1) == 30


@pytest.mark.parametrize("held", [0, 30])
@pytest.mark.parametrize("values", [(2, 2, 4, 16), (1, 2, 3, 16), (2, 1, 3, 16), (2, 2, 3)])
def test_keys_and_values_of_other_tokens_are_refused(held, values):
    cache = MixedCache.from_plan(Plan.uniform(INFO, 4, 4, SETTINGS), build("llama", torch.float32).config)
    if held:
        cache.update(torch.ones(2, 2, held, 16), torch.ones(2, 2, held, 16), 1)
    with pytest.raises(CacheError, match=r"layer 1 was given keys \[2, 2, 3, 16\] and values .*; expected \[batch"):
        cache.update(torch.ones(2, 2, 3, 16), torch.ones(values), 1)
    assert cache.get_seq_length(1) == held


@pytest.mark.parametrize(("prompt", "bad"), [(900, "values"), (30, "values"), (900, "keys")])
def test_numbers_that_cannot_be_quantized_leave_keys_and_values_of_one_length(prompt, bad):
    config = build("llama", torch.float32).config
    cache = MixedCache.from_plan(Plan.uniform(INFO, 4, 4, SETTINGS), config)
    states = {name: torch.ones(2, 2, prompt, 16) for name in ("keys", "values")}
    states[bad][0, 0, 10, 3] = torch.nan
    with pytest.raises(QuantizationError, match=f"layer 0 {bad}: NaN"):
        for _ in range(2):
            cache.update(states["keys"], states["values"], 0)
    assert len({store.length for store in cache.layers[0].stores}) == 1
    assert cache.get_seq_length() in (prompt, 2 * prompt)


@pytest.mark.slow
def test_a_refused_crop_leaves_the_cache_as_it_was():
    model = build("llama", wide=True)
    model.set_attn_implementation("kvmix")
    plan = plan_for(model, {"tokens": TokenPolicy(evict=0.5, flush=32)}, 4, 4)
    cropped, straight = (MixedCache.from_plan(plan, model.config) for _ in range(2))
    with torch.no_grad():
        for cache in (cropped, straight):
            model(ids(100), past_key_values=cache)
            model(ids(1), past_key_values=cache)
        with pytest.raises(PlanError, match="cannot go back"):
            cropped.crop(-60)
        for seed in range(40):
            logits = [model(ids(1, seed=seed), past_key_values=cache).logits for cache in (cropped, straight)]
            torch.testing.assert_close(*logits)


@pytest.mark.parametrize("name", ["plan", "composed plan", "fp8", "hf-fp8"])
def test_a_reset_cache_has_read_nothing(name):
    model = build("llama", torch.float32, wide=True)
    model.set_attn_implementation("kvmix")
    if name.endswith("plan"):
        cache = MixedCache.from_plan(plan_for(model, AXES["everything"] if name != "plan" else {}, 4, 4), model.config)
    else:
        cache = named_cache(name, model.config, model.dtype, model.device).cache(model.config)
    logits = []
    for _ in range(2):
        with torch.no_grad():
            model(ids(100), past_key_values=cache)
            logits.append(model(ids(1), past_key_values=cache).logits)
        assert cache.attended.share > 0
        cache.reset()
        assert (cache.attended.total, cache.attended.quantized, cache.get_seq_length()) == (0, 0, 0)
        if isinstance(cache, MixedCache):
            assert (cache.nbytes, cache.allocated_bytes) == (0, 0)
    torch.testing.assert_close(*logits)


def test_a_plan_for_other_layers_is_refused():
    config = build("llama", torch.float32).config
    other = ModelInfo(id="other", layers=5, kv_heads=2, head_dim=16)
    with pytest.raises(PlanError, match="the plan has 5 layers and the model 4"):
        MixedCache.from_plan(Plan.uniform(other, 2, 2), config)
    sliding = MistralConfig(num_hidden_layers=4, sliding_window=8)
    with pytest.raises(PlanError, match=r"0 \(sliding_attention\), 1 \(sliding_attention\)"):
        MixedCache.from_plan(Plan.uniform(INFO, 2, 2), sliding)


def test_heads_that_cannot_be_packed_are_named():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    cache = MixedCache.from_plan(Plan.uniform(ModelInfo(id="t", layers=1, kv_heads=2, head_dim=32), 2, 2), model.config)
    with pytest.raises(PlanError, match="layer 0 cannot be quantized: head_dim must be a positive multiple of 16"):
        model(torch.ones(1, 300, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize("in_groups", [False, True])
def test_the_encoders_of_a_plan_make_the_scales(in_groups):
    states, scales = torch.randn(1, 2, 64, 32), {}
    channels = ChannelPolicy(runs=(ChannelGroup(channels=16, bits=4),)) if in_groups else None
    functions = PolicyFunctions(lambda tokens: tokens.abs().sum(2))
    for encode in ("minmax", "refit", "search", "fitted"):
        settings = CacheSettings(page=32, group_size=32, encode=encode, channels=channels)
        for kind in ("key", "value"):
            forms = storage_forms(TensorPlan(bits=2), kind, settings, 32)
            packing = packing_of("test", forms, settings, 0, functions)
            packing.pack(states)
            scales[encode, kind] = list(packing.buffers())[-1].view
    for kind, name in (("key", "refit"), ("value", "search")):
        assert torch.equal(scales["fitted", kind], scales[name, kind])
        assert not torch.equal(scales["minmax", kind], scales[name, kind])
