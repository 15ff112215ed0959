"""Plans as other engines are told them; what they cannot express names the layers."""

import json
import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import make_info, patient, plans

from kvmix_cli.errors import ExportError
from kvmix_cli.export import TARGETS
from kvmix_cli.plan import (
    CacheSettings,
    HeadGeometry,
    LayerPlan,
    ModelInfo,
    Plan,
    TensorPlan,
    TransformSettings,
    TransformTensor,
)

STOCK = make_info(4, stock={1: "sliding_attention"})
HYBRID = make_info(4, stock={1: "linear_attention"})


def export(name, short, info=None):
    return TARGETS[name].write(Plan.from_short(short, info or make_info(4)))


@pytest.mark.parametrize(
    ("short", "arguments"),
    [
        ("0:k16v16,1-2:k8v8,3:k16v16", "--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 0 3"),
        ("0-3:k8v8", "--kv-cache-dtype fp8"),
        ("0-3:k16v16", "--kv-cache-dtype auto"),
    ],
)
def test_vllm_skips_the_layers_in_full_precision(short, arguments):
    assert export("vllm", short) == arguments + "\n"


def test_vllm_skips_layers_that_keep_their_own_cache():
    assert export("vllm", "0:k8v8,2-3:k8v8", STOCK).endswith("--kv-cache-dtype-skip-layers 1\n")


def test_modelopt_lists_the_quantized_layers():
    quantization = json.loads(export("modelopt", "0:k16v16,1-3:k8v8"))["quantization"]
    assert quantization["kv_cache_quant_algo"] == "FP8"
    assert quantization["kv_cache_quantized_layers"] == {
        f"model.layers.{layer}.self_attn": {"quant_algo": "FP8"} for layer in (1, 2, 3)
    }
    assert quantization["kv_cache_schema_version"] == 1


def test_modelopt_without_a_quantized_layer_has_no_algorithm():
    quantization = json.loads(export("modelopt", "0-3:k16v16"))["quantization"]
    assert (quantization["kv_cache_quant_algo"], quantization["kv_cache_quantized_layers"]) == (None, {})


@pytest.mark.parametrize(
    ("short", "arguments"),
    [
        ("0-3:k4v8", "--cache-type-k q4_0 --cache-type-v q8_0 --flash-attn on"),
        ("0-3:k8v16", "--cache-type-k q8_0 --cache-type-v f16"),
        ("0-3:k16v16", "--cache-type-k f16 --cache-type-v f16"),
    ],
)
def test_llama_cpp_has_one_type_for_keys_and_one_for_values(short, arguments):
    assert export("llama.cpp", short) == arguments + "\n"


def test_llama_cpp_leaves_linear_layers_alone():
    assert export("llama.cpp", "0:k4v4,2-3:k4v4", HYBRID).startswith("--cache-type-k q4_0")


@pytest.mark.parametrize(
    ("name", "short", "info", "said"),
    [
        ("vllm", "0:k8v8,1-2:k4v8,3:k2v2", None, ("vLLM", "k4v8 in layers 1-2", "k2v2 in layers 3")),
        ("vllm", "0-3:k8v16", None, ("k8v16 in layers 0-3",)),
        ("modelopt", "0-2:k8v8,3:k4v4", None, ("ModelOpt", "k4v4 in layers 3")),
        (
            "llama.cpp",
            "0-1:k4v4,2-3:k8v8",
            None,
            ("stores all layers alike", "k4v4 in layers 0-1", "k8v8 in layers 2-3"),
        ),
        ("llama.cpp", "0-2:k8v8,3:k8v3", None, ("16 (f16), 8 (q8_0), 4 (q4_0)", "k8v3 in layers 3")),
        ("llama.cpp", "0:k8v8,2-3:k8v8", STOCK, ("k8v8 in layers 0, 2-3", "k16v16 in layers 1")),
        ("kvtuner", "0-2:k4v2,3:k16v4", None, ("KVTuner", "k16v4 in layers 3")),
        ("kvtuner", "0:k8v8,2-3:k8v8", STOCK, ("sliding_attention in layers 1",)),
    ],
)
def test_what_an_engine_cannot_express_names_the_layers(name, short, info, said):
    with pytest.raises(ExportError) as error:
        export(name, short, info)
    for words in said:
        assert words in str(error.value)


def test_a_preset_of_kvtuner_cannot_hold_group_sizes():
    tensor = TensorPlan(bits=2, group_size=32)
    plan = Plan.build(make_info(1), {0: LayerPlan(k=TensorPlan(bits=2), v=tensor)})
    with pytest.raises(ExportError, match="a group size of its own in layers 0"):
        TARGETS["kvtuner"].write(plan)


@patient
@given(st.lists(st.tuples(*[st.sampled_from([1, 2, 3, 4, 8])] * 2), min_size=1, max_size=12))
def test_a_preset_of_kvtuner_comes_back_as_the_same_widths(tmp_path_factory, widths):
    short = ",".join(f"{layer}:k{k}v{v}" for layer, (k, v) in enumerate(widths))
    plan = Plan.from_short(short, make_info(len(widths)))
    path = tmp_path_factory.mktemp("preset") / "preset.yaml"
    path.write_text(TARGETS["kvtuner"].write(plan))
    assert Plan.from_kvtuner(path, plan.model, plan.cache).layers == plan.layers


@pytest.mark.slow
@patient
@given(plans())
def test_every_plan_is_expressed_or_refused(plan):
    for name in TARGETS:
        try:
            text = TARGETS[name].write(plan)
        except ExportError as error:
            assert "layers" in str(error)
        else:
            assert shlex.split(text)


LATENT = HeadGeometry(kv_heads=1, key_dim=512, value_dim=64)
EVEN = HeadGeometry(kv_heads=8, key_dim=128, value_dim=128)


@pytest.mark.parametrize("name", ["vllm", "modelopt", "llama.cpp", "kvtuner"])
def test_keys_and_values_of_different_sizes_are_refused_by_name(name):
    info = ModelInfo.of_heads({0: EVEN, 1: EVEN, 2: LATENT, 3: LATENT}, id="m", layers=4)
    said = rf"^{re.escape(name)} cannot express this plan: .* heads of 1 x 512 \(values 64\) in layers 2-3; use"
    with pytest.raises(ExportError, match=said):
        export(name, "0-3:k8v8", info)
    assert export(name, "0-1:k8v8", ModelInfo.of_heads({0: EVEN, 1: EVEN}, id="m", layers=2))


def test_llama_cpp_quantizes_whole_blocks():
    info = make_info(2, head_dim=80)
    with pytest.raises(ExportError, match="blocks of 32 channels, but the plan has heads of 2 x 80 in layers 0-1"):
        export("llama.cpp", "0-1:k8v8", info)
    assert export("llama.cpp", "0-1:k16v16", info) == "--cache-type-k f16 --cache-type-v f16\n"
    assert export("vllm", "0-1:k8v8", info)


def test_an_unknown_engine_is_told_its_nearest():
    with pytest.raises(ExportError, match="did you mean 'vllm'"):
        TARGETS["vlm"]
    with pytest.raises(ExportError, match=r"known are vllm, modelopt, llama\.cpp, kvtuner"):
        TARGETS["something"]


def test_transform_codes_are_refused_by_every_engine():
    coded = TransformTensor(widths=("2211", "3300"))
    transform = TransformSettings(basis="basis.safetensors", sha256="0" * 64)
    info = make_info(1, head_dim=32)
    plan = Plan.build(info, {0: LayerPlan(k=coded, v=TensorPlan(bits=8))}, CacheSettings(transform=transform))
    for name in ("vllm", "modelopt", "llama.cpp", "kvtuner"):
        said = rf"{re.escape(name)} cannot express this plan: .* transform codes in layers 0"
        with pytest.raises(ExportError, match=said):
            TARGETS[name].write(plan)
