"""vLLM: engine arguments for an fp8 cache that leaves some layers alone.

Source: vLLM's main branch, `CacheConfig.cache_dtype` and `CacheConfig.kv_cache_dtype_skip_layers`, a list of layer
indices (https://github.com/vllm-project/vllm/pull/33695).
"""

from __future__ import annotations

from ..plan import Plan
from .target import FP8_CAUTION, Target, fp8_layers


def express(plan: Plan) -> str:
    """Return `--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 0 3`. Raises ExportError."""
    quantized = fp8_layers(plan, "vLLM")
    if not quantized:
        return "--kv-cache-dtype auto\n"
    skipped = [str(layer) for layer in range(plan.model.layers) if layer not in quantized]
    more = ["--kv-cache-dtype-skip-layers", *skipped] if skipped else []
    return " ".join(["--kv-cache-dtype fp8", *more]) + "\n"


TARGET = Target("vllm", express, FP8_CAUTION)
