"""Plans as other engines are told them; what they cannot express names the layers."""

import itertools
import json
import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import make_info, patient, plans

from kvmix_cli.errors import DocumentError, ExportError
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
from kvmix_cli.plan.engines.formats import GGML, VLLM

ENGINES = [name for name in TARGETS if name != "vllm-plugin"]
"""Engines with formats of their own; that of plans is in test_plugin.py."""
STOCK = make_info(4, stock={1: "sliding_attention"})
HYBRID = make_info(4, stock={1: "linear_attention"})


def made(name, short, info=None, form=None):
    return TARGETS[name].export(Plan.from_short(short, info or make_info(4)), form)


def export(name, short, info=None, form=None):
    return made(name, short, info, form).text


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


@pytest.mark.parametrize(
    ("short", "layers", "dtype", "skipped"),
    [
        ("0-7:k4v4", 8, "int4_per_token_head", ""),
        ("0-79:k2v2", 80, "turboquant_3bit_nc", "0 1 78 79"),
        ("0-79:k3v4", 80, "turboquant_k3v4_nc", "0 1 78 79"),
        ("0-79:k8v4", 80, "turboquant_k8v4", "0 1 78 79"),
        ("0-2:k8v8,3-7:k4v2", 8, "fp8", ""),
        ("0:k8v8,1-7:k4v2", 8, "int4_per_token_head", "0"),
    ],
)
def test_vllm_has_the_fewest_bytes_without_fewer_bits_than_the_plan(short, layers, dtype, skipped):
    text = export("vllm", short, make_info(layers))
    assert text == f"--kv-cache-dtype {dtype}" + f" --kv-cache-dtype-skip-layers {skipped}" * bool(skipped) + "\n"


def test_vllm_takes_a_dtype_by_name():
    assert export("vllm", "0-3:k4v4", form="nvfp4") == "--kv-cache-dtype nvfp4\n"
    assert export("vllm", "0:k8v8,1-3:k2v2", form="int4_per_token_head").endswith("skip-layers 0\n")
    with pytest.raises(ExportError, match=r"no cache dtype 'int4'.*it has fp8, turboquant_k8v4"):
        export("vllm", "0-3:k4v4", form="int4")
    with pytest.raises(
        ExportError, match=r"TurboQuant leaves the first and the last 2 layers alone.*k2v2 in layers 0-3"
    ):
        export("vllm", "0-3:k2v2", form="turboquant_3bit_nc")
    with pytest.raises(ExportError, match=r"does not take every size of heads.*heads of 2 x 96"):
        export("vllm", "0-9:k2v2", make_info(10, head_dim=96), "turboquant_3bit_nc")


def test_turboquant_leaves_no_layers_alone_in_hybrid_models():
    info = make_info(40, stock={1: "linear_attention"})
    assert (
        export("vllm", "0:k2v2,2-39:k2v2", info)
        == "--kv-cache-dtype turboquant_3bit_nc --kv-cache-dtype-skip-layers 1\n"
    )


def test_an_export_says_what_it_stores():
    found = made("vllm", "0:k8v8,1-39:k3v2", make_info(40), "turboquant_3bit_nc")
    assert found.text.startswith("--kv-cache-dtype turboquant_3bit_nc")
    assert found.rounded == [
        "k8v8 as k16v16 (auto) in layers 0",
        "k3v2 as k16v16 (auto) in layers 1, 38-39",
        "k3v2 as k3v3 (turboquant_k3 and turboquant_v3) in layers 2-37",
    ]
    assert found.stored_bits == pytest.approx((4 * 16 + 36 * (3 + 48 / 64 / 2)) / 40)
    assert found.nominal_bits == pytest.approx((4 * 16 + 36 * 3) / 40)
    assert made("vllm", "0-3:k8v8").rounded == []


def test_modelopt_mixes_fp8_and_nvfp4_by_layer():
    found = made("modelopt", "0:k16v16,1:k8v4,2:k4v4,3:k2v1")
    quantization = json.loads(found.text)["quantization"]
    assert quantization["kv_cache_quant_algo"] == "MIXED_PRECISION"
    algos = [entry["quant_algo"] for entry in quantization["kv_cache_quantized_layers"].values()]
    assert algos == ["FP8", "NVFP4", "NVFP4"]
    assert found.stored_bits == (16 + 8 + 4.5 + 4.5) / 4
    assert json.loads(export("modelopt", "0-3:k4v4"))["quantization"]["kv_cache_quant_algo"] == "NVFP4"
    assert "NVFP4" not in export("modelopt", "0-3:k4v4", form="FP8")
    with pytest.raises(ExportError, match="ModelOpt has no 'INT8'; it has FP8, NVFP4"):
        export("modelopt", "0-3:k4v4", form="INT8")


@patient
@given(st.lists(st.sampled_from([16, 8, 4]), min_size=1, max_size=12))
def test_a_map_of_modelopt_comes_back_as_the_same_widths(tmp_path_factory, widths):
    plan = Plan.from_short(
        ",".join(f"{layer}:k{bits}v{bits}" for layer, bits in enumerate(widths)), make_info(len(widths))
    )
    path = tmp_path_factory.mktemp("map") / "hf_quant_config.json"
    path.write_text(TARGETS["modelopt"].export(plan).text)
    assert Plan.from_modelopt(path, plan.model, plan.cache).layers == plan.layers


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"kv_cache_quant_algo": "INT8"}, "must be FP8, NVFP4, MIXED_PRECISION or null, got 'INT8'"),
        ({"kv_cache_quant_algo": "MIXED_PRECISION"}, "there is no kv_cache_quantized_layers"),
        ({"kv_cache_quantized_layers": {"model.layers.9.self_attn": {"quant_algo": "FP8"}}}, "none of the layers 0-3"),
        ({"kv_cache_quantized_layers": {"model.layers.1.self_attn": {"quant_algo": "W4"}}}, "must be FP8, NVFP4"),
        ({"kv_cache_quantized_layers": []}, "must be a map of modules"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "null, got {'num_bits': 8, 'type': 'int'}"),
        ({"kv_cache_quant_algo": None, "kv_cache_schema_version": 2}, "kv_cache_schema_version must be 1, got 2"),
    ],
)
def test_a_faulty_map_of_modelopt_names_its_faults(tmp_path, section, said):
    path = tmp_path / "hf_quant_config.json"
    path.write_text(json.dumps({"quantization": section}))
    with pytest.raises(DocumentError, match=re.escape(said)):
        Plan.from_modelopt(path, make_info(4))


def test_one_algorithm_of_modelopt_is_of_all_layers(tmp_path):
    path = tmp_path / "config.json"
    for section, short in (
        ({"kv_cache_quant_algo": "FP8"}, "0-3:k8v8"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}, "0-3:k8v8"),
        ({"kv_cache_scheme": "NVFP4"}, "0-3:k4v4"),
        ({"kv_cache_quant_algo": None}, "0-3:k16v16"),
    ):
        path.write_text(json.dumps({"model_type": "llama", "quantization_config": section}))
        assert Plan.from_modelopt(path, make_info(4)).short == short


@pytest.mark.parametrize(
    ("short", "arguments"),
    [
        ("0-7:k4v4", "--cache-type-k q4_0 --cache-type-v q4_0"),
        (
            "0-1:k8v8,2-7:k4v4",
            "--cache-type-k q4_0 --cache-type-k-first q8_0,2 --cache-type-v q4_0 --cache-type-v-first q8_0,2",
        ),
        (
            "0:k16v4,1-6:k3v2,7:k8v4",
            "--cache-type-k q4_0 --cache-type-k-first f16,1 --cache-type-k-last q8_0,1 --cache-type-v q4_0",
        ),
    ],
)
def test_ik_llama_has_other_types_at_both_ends(short, arguments):
    found = export("ik_llama", short, make_info(8))
    assert found == f"{arguments} --k-cache-hadamard --v-cache-hadamard --flash-attn on\n"


def test_ik_llama_turns_no_cache_that_is_mostly_in_full_precision():
    text = export("ik_llama", "0-1:k8v8,2-7:k16v16", make_info(8))
    assert text.startswith("--cache-type-k f16 --cache-type-k-first q8_0,2 --cache-type-v f16 --cache-type-v-first")
    assert "hadamard" not in text
    assert "--flash-attn on" in text


@pytest.mark.slow
@patient
@given(st.lists(st.sampled_from([2, 4, 8, 16]), min_size=1, max_size=9))
def test_ik_llama_stores_the_fewest_bytes_of_all_its_types(widths):
    """Every choice of a middle and of two ends, tried one by one."""
    if set(widths) == {16}:
        return
    names, layers = {"q4_0": 4.5, "q8_0": 8.5, "f16": 16.0}, len(widths)
    ladder = {2: 4.5, 4: 4.5, 8: 8.5, 16: 16.0}
    needs = [ladder[bits] for bits in widths]

    def stored(middle, first, head, last, tail):
        return [first if i < head else last if i >= layers - tail else middle for i in range(layers)]

    ends = [(head, tail) for head in range(layers + 1) for tail in range(layers + 1 - head)]
    tried = [
        stored(middle, first, head, last, tail)
        for middle, first, last in itertools.product(names.values(), repeat=3)
        for head, tail in ends
    ]
    least = min(sum(each) for each in tried if all(a >= b for a, b in zip(each, needs, strict=True)))
    try:
        found = made("ik_llama", ",".join(f"{i}:k{b}v{b}" for i, b in enumerate(widths)), make_info(layers))
    except ExportError:
        assert least == 16 * layers
    else:
        assert found.stored_bits == pytest.approx(least / layers)


def test_types_of_llama_cpp_by_name():
    assert export("llama.cpp", "0-3:k8v8", form="q5_0") == "--cache-type-k q5_0 --cache-type-v q5_0 --flash-attn on\n"
    found = made("ik_llama", "0:k8v8,1-3:k2v2", form="q8_0,q4_1")
    assert found.text.startswith("--cache-type-k q8_0 --cache-type-v q4_1")
    assert found.rounded == ["k8v8 as k8v4 (q8_0 and q4_1) in layers 0", "k2v2 as k8v4 (q8_0 and q4_1) in layers 1-3"]
    with pytest.raises(ExportError, match=r"no cache type 'q4_9'.*give one of f16, q8_0"):
        export("llama.cpp", "0-3:k8v8", form="q4_9")
    with pytest.raises(ExportError, match="leave out --format q8_0"):
        export("kvtuner", "0-3:k8v8", form="q8_0")


def test_kvtuner_keeps_no_sink():
    found = made("kvtuner", "0-3:k8v4")
    assert found.formats is None
    assert (found.plan.cache.sink, found.rounded, found.stored_bits) == (0, [], found.plan.bits.stored)


def test_every_name_that_can_be_written_is_one_that_the_engines_take():
    """From vLLM 0.32.0, `CacheDType`; llama.cpp 0c1e570, `kv_cache_types`; ik_llama.cpp 8337e4c, which has two more."""
    vllm = {"auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla", "nvfp4_ds_mla"}
    vllm |= {"turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc", "ultraquant_4bit"}
    vllm |= {"int4_per_token_head", "int8_per_token_head", "fp8_per_token_head", "nvfp4", "nvfp4_4over6"}
    llama_cpp = {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"}
    assert {*VLLM, "auto"} <= vllm
    assert llama_cpp >= GGML.keys()


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
        ("vllm", "0:k16v16,1-3:k8v16", None, ("vLLM", "k16v16 in layers 0", "k8v16 in layers 1-3")),
        ("modelopt", "0-3:k8v16", None, ("ModelOpt", "k8v16 in layers 0-3")),
        ("llama.cpp", "0:k16v16,1-3:k8v8", None, ("stores all layers alike", "k16v16 in layers 0", "k8v8 in layers")),
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
        TARGETS["kvtuner"].export(plan)


@patient
@given(st.lists(st.tuples(*[st.sampled_from([1, 2, 3, 4, 8])] * 2), min_size=1, max_size=12))
def test_a_preset_of_kvtuner_comes_back_as_the_same_widths(tmp_path_factory, widths):
    short = ",".join(f"{layer}:k{k}v{v}" for layer, (k, v) in enumerate(widths))
    plan = Plan.from_short(short, make_info(len(widths)))
    path = tmp_path_factory.mktemp("preset") / "preset.yaml"
    path.write_text(TARGETS["kvtuner"].export(plan).text)
    assert Plan.from_kvtuner(path, plan.model, plan.cache).layers == plan.layers


@pytest.mark.slow
@patient
@given(plans())
def test_every_plan_is_expressed_or_refused(plan):
    for name in ENGINES:
        try:
            found = TARGETS[name].export(plan)
        except ExportError as error:
            assert "layers" in str(error)
        else:
            assert shlex.split(found.text)
            for layer, (k, v) in (found.formats or {}).items():
                assert k.bits >= plan.layers[layer].k.bits
                assert v.bits >= plan.layers[layer].v.bits
                assert k.takes(plan.model.heads(layer).key_dim)


LATENT = HeadGeometry(kv_heads=1, key_dim=512, value_dim=64)
EVEN = HeadGeometry(kv_heads=8, key_dim=128, value_dim=128)


@pytest.mark.parametrize("name", ENGINES)
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
    with pytest.raises(ExportError, match=r"known are vllm, vllm-plugin, modelopt, llama\.cpp, ik_llama, kvtuner"):
        TARGETS["something"]


def test_transform_codes_are_refused_by_every_engine():
    coded = TransformTensor(widths=("2211", "3300"))
    transform = TransformSettings(basis="basis.safetensors", sha256="0" * 64)
    info = make_info(1, head_dim=32)
    plan = Plan.build(info, {0: LayerPlan(k=coded, v=TensorPlan(bits=8))}, CacheSettings(transform=transform))
    for name in ENGINES:
        said = rf"{re.escape(name)} cannot express this plan: .* transform codes in layers 0"
        with pytest.raises(ExportError, match=said):
            TARGETS[name].export(plan)
