"""Counting, bytes, and plans that do not fit."""

import pytest
import torch
from architectures import build
from kvmix_kernels.runtime.native import library
from kvmix_kernels.segments import Packed
from transformers import MistralConfig

from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.cache.sizes import cache_nbytes
from kvmix_cli.errors import PlanError, QuantizationError
from kvmix_cli.models.geometry import stock_layers
from kvmix_cli.plan import CacheSettings, ModelInfo, Plan
from kvmix_cli.plan.windows import Recent, Rpc

INFO = ModelInfo(id="test", layers=4, kv_heads=2, head_dim=16)


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
