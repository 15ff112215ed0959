"""ModelOpt: the `hf_quant_config.json` of a checkpoint whose KV cache alone is quantized, layer by layer.

Source: NVIDIA Model-Optimizer's main branch, `kv_cache_quantized_layers`, schema version 1: FP8 or NVFP4 for keys and
values together (https://github.com/NVIDIA/Model-Optimizer/pull/2272); for vLLM, https://github.com/vllm-project/vllm/
pull/56116. `Plan.from_modelopt` reads it.
"""

from __future__ import annotations

import json

from .._version import __version__
from ..errors import ExportError, did_you_mean
from ..plan import Plan
from ..plan.engines.formats import FULL, MODELOPT
from ..plan.engines.modelopt import MIXED, SCHEMA
from .target import AGAIN, FP8_CAUTION, Export, Target, quantizes, refuse, widths


def express(plan: Plan, form: str | None) -> Export:
    """Return JSON; layers that are not listed stay in full precision. Raises ExportError."""
    if form is not None and form not in MODELOPT:
        raise ExportError(f"ModelOpt has no '{form}'{did_you_mean(form, MODELOPT)}; it has {', '.join(MODELOPT)}")
    names = [form] if form is not None else sorted(MODELOPT, key=lambda name: MODELOPT[name].bits)
    chosen: dict[int, str] = {}
    for layer, pair in widths(plan).items():
        dim = plan.model.heads(layer).key_dim
        fits = [name for name in names if max(pair) <= MODELOPT[name].bits and MODELOPT[name].takes(dim)]
        if fits:
            chosen[layer] = fits[0]
    if quantizes(plan) and not chosen:
        rule = "it stores the keys and values of a layer both in fp8 (k8v8) or nvfp4 (k4v4), or both in full precision"
        what = {index: layer.short for index, layer in plan.layers.items()}
        refuse("ModelOpt", rule, what, "allocate with --k-bits 8 --v-bits 8")
    formats = {layer: (MODELOPT[chosen[layer]] if layer in chosen else FULL,) * 2 for layer in plan.layers}
    return Export(_text(chosen), formats, plan)


def _text(chosen: dict[int, str]) -> str:
    used = sorted(set(chosen.values()))
    quantization = {
        "quant_algo": None,
        "quantized_layers": {},
        "kv_cache_quant_algo": (used[0] if len(used) == 1 else MIXED) if used else None,
        "kv_cache_quantized_layers": {
            f"model.layers.{layer}.self_attn": {"quant_algo": name} for layer, name in sorted(chosen.items())
        },
        "kv_cache_schema_version": SCHEMA,
    }
    producer = {"name": "kvmix", "version": __version__}
    return json.dumps({"producer": producer, "quantization": quantization}, indent=2) + "\n"


TARGET = Target(
    "modelopt",
    express,
    "layers are named as in Llama (model.layers.N.self_attn): rename them if the model's differ; vLLM up to 0.32 reads "
    f"one algorithm for all layers and no map; {FP8_CAUTION}; 4 bits are nvfp4 and need a Blackwell GPU: {AGAIN}",
)
