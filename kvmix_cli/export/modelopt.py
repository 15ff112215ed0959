"""ModelOpt: the `hf_quant_config.json` of a checkpoint whose KV cache alone is quantized, layer by layer.

Source: NVIDIA Model-Optimizer's main branch, `kv_cache_quantized_layers`, schema version 1
(https://github.com/NVIDIA/Model-Optimizer/pull/2272); for vLLM, https://github.com/vllm-project/vllm/pull/56116.
"""

from __future__ import annotations

import json

from .._version import __version__
from ..plan import Plan
from .target import FP8_CAUTION, Target, fp8_layers


def express(plan: Plan) -> str:
    """Return JSON; layers that are not listed stay in full precision. Raises ExportError."""
    layers = {f"model.layers.{layer}.self_attn": {"quant_algo": "FP8"} for layer in fp8_layers(plan, "ModelOpt")}
    quantization = {
        "quant_algo": None,
        "quantized_layers": {},
        "kv_cache_quant_algo": "FP8" if layers else None,
        "kv_cache_quantized_layers": layers,
        "kv_cache_schema_version": 1,
    }
    producer = {"name": "kvmix", "version": __version__}
    return json.dumps({"producer": producer, "quantization": quantization}, indent=2) + "\n"


TARGET = Target(
    "modelopt",
    express,
    f"layers are named as in Llama (model.layers.N.self_attn): rename them if the model's differ; {FP8_CAUTION}",
)
