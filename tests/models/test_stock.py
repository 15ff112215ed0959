"""Bytes of caches from configurations alone, against the tensors of models that have run: 0 bytes off."""

import pytest
import torch
import transformers
from architectures import VOCABULARY
from coding import coded_plan
from kvmix_kernels.transform_layout import exact_count
from stock_caches import FAMILIES, config_named, model_named
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicCache

from kvmix_cli import torchless
from kvmix_cli.cache.baselines.casting import FP8, CastCache
from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.cache.sizes import cache_nbytes, layer_nbytes
from kvmix_cli.models import geometry
from kvmix_cli.models.activations import activation_sizes
from kvmix_cli.models.geometry import model_info
from kvmix_cli.models.stock import stock_cache
from kvmix_cli.models.weight_bytes import WeightBytes
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.windows import Recent
from kvmix_cli.studies.fit.facts import ModelFacts
from kvmix_cli.studies.fit.formats import PlanFormat, StockFormat

BATCH, PROMPT = 2, 75
ELEMENT_BYTES = 2
SETTINGS = CacheSettings(page=16, sink=4, group_size=16, window=Recent(tokens=10))


def facts_of(config):
    layers = stock_cache(config, "m")
    sizes = activation_sizes(config, layers)
    return ModelFacts(model_info(config, "m"), layers, WeightBytes({}, "nowhere"), sizes, None, "bfloat16")


def ids(tokens):
    return torch.randint(2, VOCABULARY, (BATCH, tokens), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def filled(model, cache, *pieces):
    for tokens in pieces:
        model(input_ids=ids(tokens), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_are_those_of_the_tensors(name):
    """transformers' cache layer by layer, ours with a plan once its window has been applied, and fp8."""
    model = model_named(name, torch.bfloat16)
    facts = facts_of(model.config)
    at = PROMPT, BATCH, ELEMENT_BYTES
    stock = filled(model, DynamicCache(config=model.config), PROMPT)
    assert [layer.nbytes(*at) for layer in facts.layers] == [layer_nbytes(layer) for layer in stock.layers]
    own = StockFormat("own", facts, ELEMENT_BYTES, None)
    assert own.cache_bytes(PROMPT, BATCH) == cache_nbytes(stock)
    cast = filled(model, CastCache(FP8, model.config), PROMPT)
    assert StockFormat("fp8", facts, ELEMENT_BYTES, None, cast_bytes=1).cache_bytes(PROMPT, BATCH) == cache_nbytes(cast)

    widths = {layer: (4, 2) if layer % 2 else (3, 8) for layer in facts.info.quantizable}
    plan = Plan.from_short(",".join(f"{layer}:k{k}v{v}" for layer, (k, v) in widths.items()), facts.info, SETTINGS)
    form = PlanFormat("plan", facts, ELEMENT_BYTES, None, plan=plan)
    ours = filled(model, MixedCache.from_plan(plan, model.config), PROMPT, 1)
    others = own.cache_bytes(PROMPT + 1, BATCH) - own.cache_bytes(PROMPT, BATCH)
    assert form.cache_bytes(PROMPT, BATCH) + others == cache_nbytes(ours)
    assert sum(form.by_kind(PROMPT, BATCH).values()) == form.cache_bytes(PROMPT, BATCH)


def test_plans_of_transform_codes(tmp_path):
    """With an exact token of each page, in a model that also has layers with windows."""
    model = model_named("gemma3", torch.float32)
    model.set_attn_implementation("kvmix")
    facts, plan = facts_of(model.config), coded_plan(model, tmp_path, exact=1)
    form = PlanFormat("plan", facts, 4, None, plan=plan)
    cache = filled(model, MixedCache.from_plan(plan, model.config), PROMPT, 1)
    stock = StockFormat("own", facts, 4, None)
    others = stock.cache_bytes(PROMPT + 1, BATCH) - stock.cache_bytes(PROMPT, BATCH)
    weights = 1 + exact_count(1, 1, plan.cache.page)  # of the last token's query: its own, and of each exact token
    statistic = sum(plan.model.heads(layer).kv_heads for layer in plan.layers) * weights * 4 * BATCH
    assert form.cache_bytes(PROMPT, BATCH) + others + statistic == cache_nbytes(cache)


def test_layers_that_attend_to_images_keep_all_tiles_of_them():
    config = config_named("cross")
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    layers, cache = stock_cache(config, "m"), DynamicCache(config=config)
    with torch.inference_mode():
        model(
            input_ids=ids(20),
            pixel_values=torch.zeros(BATCH, 1, 2, 3, 28, 28, dtype=torch.bfloat16),
            aspect_ratio_ids=torch.ones(BATCH, 1, dtype=torch.long),
            aspect_ratio_mask=torch.ones(BATCH, 1, 2, dtype=torch.long),
            cross_attention_mask=torch.ones(BATCH, 20, 1, 2, dtype=torch.long),
            past_key_values=cache,
            use_cache=True,
        )
    assert [layer.kind for layer in layers] == ["full", "cross", "full", "cross"]
    assert [layer.nbytes(20, BATCH, 2, images=1) for layer in layers] == [layer_nbytes(each) for each in cache.layers]


@pytest.mark.parametrize("name", FAMILIES)
def test_without_torch_the_same_is_read(name, monkeypatch):
    config = config_named(name)
    whole = model_info(config, "m"), stock_cache(config, "m")
    monkeypatch.setattr(torchless, "is_hidden", lambda: True)
    assert (model_info(config, "m"), stock_cache(config, "m")) == whole


@pytest.mark.slow
def test_every_kind_of_layer_is_known():
    """Those that transformers has, and those that modules of models add to them."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4  # noqa: F401
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl  # noqa: F401
    from transformers.models.unlimited_ocr import modeling_unlimited_ocr  # noqa: F401

    text = config_named("llama")
    appending = {kind for kind in DYNAMIC_LAYER_TYPE_MAPPING if geometry._appends(kind, text)}
    assert appending == geometry.APPENDING
    assert set(DYNAMIC_LAYER_TYPE_MAPPING) - appending == geometry.OTHER_KINDS


def test_a_kind_that_only_transformers_knows_needs_torch(monkeypatch):
    config = config_named("gemma3")
    config.layer_types = ["new_attention", *config.layer_types[1:]]
    monkeypatch.setattr(torchless, "is_hidden", lambda: True)
    with pytest.raises(torchless.TorchNeeded, match="layers of new_attention"):
        stock_cache(config, "m")
