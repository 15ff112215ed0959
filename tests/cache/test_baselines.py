"""Other people's caches: what they store, what they give back, and what is counted of them."""

import copy

import pytest
import torch
import transformers.cache_utils
from architectures import build
from others import need_quanto
from transformers.cache_utils import QuantizedCache

from kvmix_cli.cache.baselines.casting import CastCache, CastLayer
from kvmix_cli.cache.baselines.named import BASELINES, named_cache
from kvmix_cli.cache.baselines.rounding import FP8
from kvmix_cli.cache.sizes import cache_nbytes
from kvmix_cli.errors import EvaluationError

LAYERS, BATCH, HEADS, TOKENS, SIZE = 4, 2, 2, 192, 16
WORST = {"bf16": 0.005, "fp8": 0.04, "hf-fp8": 0.04, "hf-quanto-4": 0.13, "hf-quanto-2": 0.6}
WORST |= {"hf-hqq-8": 0.02, "hf-hqq-4": 0.15, "hf-hqq-3": 0.3, "hf-hqq-2": 0.6, "hf-hqq-1": 2.0}
"""Root mean square error on standard normal numbers, with room."""


@pytest.fixture(scope="module")
def model():
    return build("llama", torch.float32)


def baseline(name, model):
    return named_cache(name, model.config, model.dtype, model.device)


def need(name):
    if "quanto" in name:
        need_quanto()
    elif "hqq" in name:
        pytest.importorskip("hqq")


def make(name, model):
    need(name)
    return baseline(name, model).cache(model.config)


def numbers(tokens=TOKENS, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, HEADS, tokens, SIZE)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("name", BASELINES)
def test_a_context_is_read_back_nearly_as_it_was_and_the_prompt_sees_itself_as_it_is(name, model):
    cache = make(name, model)
    keys, values = numbers()
    first = cache.update(keys, values, 0)
    assert first[0] is keys
    assert first[1] is values
    new = numbers(1, seed=1)
    for read, context, token in zip(cache.update(*new, 0), (keys, values), new, strict=True):
        assert read.shape == (BATCH, HEADS, TOKENS + 1, SIZE)
        assert read.dtype == torch.float32
        error = (read[:, :, :TOKENS] - context).pow(2).mean().sqrt()
        assert 0 < error < WORST[name]
        assert (read[:, :, TOKENS:] - token).abs().max() < 0.2


@pytest.mark.parametrize("name", [name for name in BASELINES if "hf-" in name])
def test_the_stock_cache_does_what_it_would_do_without_us(name, model):
    cache = make(name, model)
    settings = baseline(name, model).settings
    plain = QuantizedCache(
        settings["backend"],
        model.config,
        **{key: settings[key] for key in ("nbits", "axis_key", "axis_value") if key in settings},
    )
    for step, tokens in enumerate((TOKENS, 1, 127, 1)):
        new = numbers(tokens, seed=step)
        for ours, theirs in zip(cache.update(*new, 0), plain.update(*new, 0), strict=True):
            assert torch.equal(ours, theirs)


SCALES = {torch.float32: 64 / 64, torch.bfloat16: 32 / 64}
"""A scale and a zero for 64 numbers, in the model's dtype."""
HQQ_3_BIT = 7 * 32 / 64
"""HQQ packs ten 3-bit codes into 32 bits: seven words hold 64 of them."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASELINES)
def test_stored_bits_are_those_of_the_tensors_with_their_scales(name, dtype):
    need(name)
    found = baseline(name, build("llama", dtype))
    codes = HQQ_3_BIT if name == "hf-hqq-3" else found.nominal_bits
    scales = SCALES[dtype] if "quanto" in name or "hqq" in name else 0
    assert found.stored_bits == pytest.approx(codes + scales, abs=0.01)
    assert (found.stored_bits > found.nominal_bits) == (name not in ("bf16", "fp8"))


@pytest.mark.parametrize("name", BASELINES)
def test_the_bytes_of_a_cache_are_those_of_its_codes_scales_and_residual(name, model):
    cache = make(name, model)
    stored = baseline(name, model).stored_bits
    context, residual = 1024, 3
    for layer in range(LAYERS):
        cache.update(*numbers(context), layer)
        for _ in range(residual):
            cache.update(*numbers(1), layer)
    per_token = 2 * LAYERS * BATCH * HEADS * SIZE
    has_residual = "quanto" in name or "hqq" in name
    expected = context * per_token * stored / 8 + residual * per_token * (4 if has_residual else stored / 8)
    assert cache_nbytes(cache) == pytest.approx(expected, rel=0.001)
    assert cache_nbytes(cache) < context * per_token * 4


def steps(cache, model, *counts):
    """Feed so many tokens at a time; the share of what the last queries read that was quantized."""
    share = None
    for count in counts:
        cache.attended.reset()
        with torch.no_grad():
            model(torch.ones(BATCH, count, dtype=torch.long), past_key_values=cache)
        share = cache.attended
    return share.quantized / share.total, share.total


@pytest.mark.parametrize("name", [name for name in BASELINES if "-4" in name])
def test_the_residual_does_not_count_as_quantized(name, model):
    assert steps(make(name, model), model, 128)[0] == 0
    share, total = steps(make(name, model), model, 128, 1)
    assert total == LAYERS * BATCH * 129
    assert share == pytest.approx(128 / 129)
    assert steps(make(name, model), model, 128, 32, 32)[0] == pytest.approx(128 / (192 - 31 / 2))
    # 96 and 32 more tokens reach the residual's 128: everything is quantized again, and the next query reads it so
    assert steps(make(name, model), model, 128, 96, 32, 1)[0] == pytest.approx(256 / 257)


@pytest.mark.parametrize(("name", "share"), [("fp8", 1), ("hf-fp8", 1), ("bf16", 0)])
def test_eight_bit_floats_count_as_quantized_after_the_prompt_and_sixteen_bits_never(name, share, model):
    assert steps(make(name, model), model, 100)[0] == 0
    read, total = steps(make(name, model), model, 100, 7)
    assert read == share
    assert total == LAYERS * BATCH * 7 * (107 - 3)


def test_bf16_is_exactly_the_rounded_numbers_and_fp8_never_overflows(model):
    keys, values = numbers()
    keys[0, 0, 0, :2] = torch.tensor([1e4, -1e4])
    for stored, expected in ((torch.bfloat16, keys.bfloat16()), (FP8, keys.clamp(-448, 448).to(FP8))):
        cache = CastCache(stored, model.config)
        cache.update(keys, values, 0)
        read, _ = cache.update(*numbers(1), 0)
        assert torch.equal(read[:, :, :TOKENS], expected.float())
        assert read.isfinite().all()


@pytest.mark.parametrize("stored", [torch.bfloat16, FP8])
def test_a_cast_cache_can_be_reordered_repeated_and_cropped(stored, model):
    cache = CastCache(stored, model.config)
    keys, values = numbers()
    cache.update(keys, values, 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.crop(-1)
    read, _ = cache.update(*numbers(1), 0)
    assert torch.equal(read[:, :, : TOKENS - 1], keys.flip(0)[:, :, : TOKENS - 1].to(stored).float())


def test_layers_without_full_attention_keep_their_stock_cache():
    model = build("gemma3", torch.float32)
    cache = CastCache(FP8, model.config)
    assert [isinstance(layer, CastLayer) for layer in cache.layers] == [False, True, False, True]
    share, _ = steps(cache, model, 20, 1)
    assert share == pytest.approx(0.5)
    assert baseline("hf-fp8", model).stored_bits is None


@pytest.mark.parametrize(
    ("name", "check", "package"),
    [
        ("hf-quanto-4", "is_optimum_quanto_available", "optimum-quanto"),
        ("hf-hqq-2", "is_hqq_available", "hqq"),
    ],
)
def test_what_is_not_installed_says_how_to_install_it(name, check, package, model, monkeypatch):
    monkeypatch.setattr(transformers.cache_utils, check, lambda: False)
    found = baseline(name, model)
    assert found.stored_bits is None
    with pytest.raises(EvaluationError, match=f"{name} needs {package}: pip install {package}"):
        found.cache(model.config)


def test_an_unknown_name_is_an_error(model):
    with pytest.raises(EvaluationError, match=r"no cache 'hf-quant-4' \(did you mean 'hf-quanto-4'\?\)"):
        baseline("hf-quant-4", model)


def test_settings_say_what_numbers_depend_on(model):
    need("hf-hqq-3")
    settings = baseline("hf-hqq-3", model).settings
    assert (settings["backend"], settings["nbits"], settings["axis_key"]) == ("hqq", 3, 0)
    assert {"transformers", "hqq"} <= set(settings)
    assert baseline("bf16", model).settings == {"dtype": "bfloat16"}


def test_bits_are_the_same_for_heads_of_any_shape(model):
    need("hf-quanto-4")
    odd = copy.deepcopy(model.config)
    odd.num_attention_heads, odd.num_key_value_heads, odd.head_dim = 6, 3, 80
    found = [named_cache(name, odd, model.dtype, model.device) for name in ("fp8", "hf-quanto-4")]
    assert [each.stored_bits for each in found] == [8, 5]
