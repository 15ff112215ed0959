"""What other engines' formats make of numbers, against llama.cpp's own quantizers and the rules of vLLM's."""

import math

import numpy as np
import pytest
import torch
from architectures import build

from kvmix_cli.cache.baselines.casting import EngineCache, RoundedLayer
from kvmix_cli.cache.baselines.rounding import gaussian_levels, rounding
from kvmix_cli.cache.transforms.rotation import sylvester
from kvmix_cli.errors import EvaluationError
from kvmix_cli.plan.engines.formats import FULL, GGML, MODELOPT, VLLM, EngineFormat

gguf = pytest.importorskip("gguf")
FORMATS = {each.name: each for pair in VLLM.values() for each in pair} | GGML
QUANTIZED = [name for name, each in FORMATS.items() if not each.is_full]
WORST = {8: 0.04, 5: 0.05, 4: 0.14, 3: 0.28}
"""Root mean square error on standard normal numbers, with room."""


def numbers(dim=128, seed=0, shape=(2, 3, 5)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dim, generator=generator) * torch.randn(*shape, 1, generator=generator).exp()


@pytest.mark.parametrize("name", [name for name in GGML if name != "f16"])
def test_blocks_are_those_of_llama_cpp(name):
    x = numbers()
    x[0, 0, 0, :32] = 0
    x[0, 0, 1] = -3.5
    kind = gguf.GGMLQuantizationType[name.upper()]
    theirs = gguf.dequantize(gguf.quantize(x.numpy(), kind), kind)
    # a code may fall on the other side of a tie: numpy and torch round the same products differently in the last bit
    assert np.mean(theirs != rounding(GGML[name])(x).numpy()) < 2e-3
    assert np.abs(theirs - rounding(GGML[name])(x).numpy()).max() <= x.abs().max().item() / 2 ** (GGML[name].bits - 1)
    assert gguf.quantize(x.numpy(), kind).shape[-1] == GGML[name].nbytes(128)


@pytest.mark.parametrize("name", QUANTIZED)
def test_numbers_come_back_nearly_as_they_were_and_zeros_as_zeros(name):
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    read = rounding(FORMATS[name])(x)
    assert read.dtype == torch.float32
    assert 0 < (read - x).square().mean().sqrt() < WORST[FORMATS[name].bits]
    assert rounding(FORMATS[name])(torch.zeros(2, 128)).abs().max() < 1e-5


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_token_does_not_depend_on_those_beside_it(name):
    x = numbers(seed=2)
    alone = torch.cat([rounding(FORMATS[name])(each) for each in x.split(1, dim=2)], dim=2)
    torch.testing.assert_close(alone, rounding(FORMATS[name])(x), rtol=1e-5, atol=1e-5)


def test_stored_bits_of_every_format():
    """Bytes of a head of 128 channels, from vLLM's slots and llama.cpp's blocks."""
    found = {name: tuple(each.nbytes(128) for each in pair) for name, pair in VLLM.items()}
    assert found == {
        "fp8": (128, 128),
        "turboquant_k8v4": (128, 68),
        "turboquant_4bit_nc": (66, 68),
        "turboquant_k3v4_nc": (50, 68),
        "turboquant_3bit_nc": (50, 52),
        "int8_per_token_head": (132, 132),
        "fp8_per_token_head": (132, 132),
        "int4_per_token_head": (68, 68),
        "nvfp4": (72, 72),
    }
    assert {name: each.stored_bits(128) for name, each in GGML.items()} == {
        "f16": 16,
        "q8_0": 8.5,
        "q5_1": 6,
        "q5_0": 5.5,
        "q4_1": 5,
        "q4_0": 4.5,
    }
    assert FULL.nbytes(80) == 160


def test_heads_that_a_format_does_not_take():
    assert not GGML["q8_0"].takes(80)
    assert GGML["f16"].takes(80), "full precision has no blocks"
    assert not VLLM["turboquant_3bit_nc"][0].takes(96)
    assert VLLM["int4_per_token_head"][0].takes(96)
    assert not MODELOPT["NVFP4"].takes(40)


def test_nvfp4_rounds_to_e2m1_with_ties_to_even():
    x = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.3, -5.0, -5.1, 0.0, 1.0, 2.9, 0.2])
    expected = [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -0.5, -4.0, -6.0, 0.0, 1.0, 3.0, 0.0]
    assert rounding(MODELOPT["NVFP4"])(x).tolist() == expected
    assert rounding(MODELOPT["NVFP4"])(x * 1e5).isfinite().all()


def test_scales_of_a_token_and_head():
    x = numbers()
    scale = x.abs().amax(-1, keepdim=True) / 127
    read = rounding(VLLM["int8_per_token_head"][0])(x)
    assert ((read - x).abs() <= scale * 0.5001).all()
    torch.testing.assert_close(read / scale, (read / scale).round(), rtol=0, atol=1e-3)


def test_int4_turns_a_head_with_signs_and_keeps_its_zero():
    """A naive version in float64, element by element."""
    x = numbers(dim=96, shape=(3,)).double()
    signs = torch.Generator().manual_seed(0x9E3779B9)
    signs = 2 * torch.bernoulli(torch.full((32,), 0.5), generator=signs).double() - 1
    matrix = sylvester(32, torch.device("cpu")).double()
    turned = ((x.unflatten(-1, (3, 32)) * signs) @ matrix * math.sqrt(32)).flatten(-2)
    low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(0, 15)
    codes = (turned / scale + zero).round().clamp(0, 15)
    back = ((codes - zero) * scale).unflatten(-1, (3, 32)) @ matrix / math.sqrt(32) * signs
    read = rounding(VLLM["int4_per_token_head"][0])(x.float())
    torch.testing.assert_close(read.double(), back.flatten(-2), rtol=1e-4, atol=1e-5)


def test_levels_of_a_normal_distribution():
    """Max 1960, table I: 2, 4 and 8 levels."""
    assert gaussian_levels(1)[1:].tolist() == pytest.approx([0.7979], abs=1e-4)
    assert gaussian_levels(2)[2:].tolist() == pytest.approx([0.4528, 1.510], abs=1e-3)
    assert gaussian_levels(3)[4:].tolist() == pytest.approx([0.2451, 0.7560, 1.344, 2.152], abs=1e-3)


def test_turboquant_keeps_the_norm_of_a_key():
    x = numbers()
    read = rounding(VLLM["turboquant_3bit_nc"][0])(x)
    torch.testing.assert_close(read.norm(dim=-1), x.norm(dim=-1), rtol=2e-3, atol=0)


@pytest.mark.parametrize(("dim", "most", "size"), [(128, 2**16, 128), (128, 64, 64), (192, 2**16, 64), (96, 64, None)])
def test_turned_heads_are_rounded_in_other_coordinates(dim, most, size):
    x = numbers(dim)
    turned = EngineFormat("q4_0", 4, 32, 2, turned=most)
    expected = rounding(GGML["q4_0"])(x)
    if size is not None:
        matrix = torch.block_diag(*[sylvester(size, torch.device("cpu"))] * (dim // size))
        expected = rounding(GGML["q4_0"])(x @ matrix) @ matrix
    torch.testing.assert_close(rounding(turned)(x), expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def model():
    return build("llama", torch.float32)


def test_a_cache_rounds_the_layers_it_is_told(model):
    cache = EngineCache({0: (GGML["q8_0"],) * 2, 1: (FULL, FULL), 2: (FULL, MODELOPT["FP8"])}, model.config)
    assert [isinstance(layer, RoundedLayer) for layer in cache.layers] == [True, False, True, False]
    keys, values = numbers(32, shape=(1, 2, 7)), numbers(32, 1, shape=(1, 2, 7))
    one = torch.ones(1, 2, 1, 32)
    for layer in range(3):
        first = cache.update(keys, values, layer)
        assert first[0] is keys or layer == 1
        read_keys, read_values = cache.update(one, one, layer)
        is_rounded = {0: (True, True), 1: (False, False), 2: (False, True)}[layer]
        assert (
            not torch.equal(read_keys[:, :, :7], keys),
            not torch.equal(read_values[:, :, :7], values),
        ) == is_rounded


def test_layers_with_a_window_are_not_simulated():
    with pytest.raises(EvaluationError, match="layer 0 is a DynamicSlidingWindowLayer"):
        EngineCache({0: (GGML["q8_0"],) * 2}, build("gemma3", torch.float32).config)
