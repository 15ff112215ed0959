"""vLLM: engine arguments for one cache dtype that leaves some layers alone.

Source: vLLM 0.32.0, `CacheConfig.cache_dtype` and `CacheConfig.kv_cache_dtype_skip_layers`, a list of layer indices
(https://github.com/vllm-project/vllm/pull/33695); `EngineArgs.create_engine_config` adds the first two and the last
two layers to it for TurboQuant (`TurboQuantConfig.get_boundary_skip_layers`).
"""

from __future__ import annotations

from collections.abc import Collection

from ..errors import ExportError, did_you_mean
from ..plan import Plan
from ..plan.engines.formats import FULL, VLLM
from .target import AGAIN, FP8_CAUTION, Export, FormatPair, Target, quantizes, refuse, widths

OF_CHOICE = tuple(name for name in VLLM if name != "nvfp4")
"""Dtypes to choose from where none is named: nvfp4 needs a Blackwell GPU."""
TURBO = "turboquant_"
BOUNDARY = 2
"""Layers at each end that TurboQuant leaves alone, whatever the arguments say."""
HYBRID = ("linear", "mamba", "conv", "recurrent")
"""Words in the kinds of stock layers of models in which it does not."""


def express(plan: Plan, form: str | None) -> Export:
    """Return `--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 0 3`. Raises ExportError."""
    if form is not None and form not in VLLM:
        raise ExportError(f"vLLM has no cache dtype '{form}'{did_you_mean(form, VLLM)}; it has {', '.join(VLLM)}")
    if not quantizes(plan):
        return Export("--kv-cache-dtype auto\n", dict.fromkeys(plan.layers, (FULL, FULL)), plan)
    heads = {index: plan.model.heads(index) for index in plan.layers}
    found = [
        _stored(plan, name)
        for name in ([form] if form is not None else OF_CHOICE)
        if all(VLLM[name][kind].takes(each.key_dim) for each in heads.values() for kind in (0, 1))
    ]
    if not found:
        sizes = {index: f"heads of {each}" for index, each in heads.items()}
        refuse("vLLM", f"{form} does not take every size of heads", sizes, "name another --format, such as fp8")
    least = min(found, key=lambda each: each.stored_bits)
    if all(k.is_full for k, _ in (least.formats or {}).values()):
        rule = "it stores the keys and values of a layer both in one of its formats or both in full precision"
        if form is not None and form.startswith(TURBO):
            rule = f"TurboQuant leaves the first and the last {BOUNDARY} layers alone, and layers with wider tensors"
        what = {index: layer.short for index, layer in plan.layers.items()}
        refuse("vLLM", rule, what, "allocate with fewer bits, such as --k-bits 8 --v-bits 8, or name another --format")
    return least


def _stored(plan: Plan, name: str) -> Export:
    """Return a plan in a dtype: layers in which it has too few bits are skipped."""
    k, v = VLLM[name]
    skipped = set(plan.model.stock) | (_boundary(plan) if name.startswith(TURBO) else set())
    formats: dict[int, FormatPair] = {}
    for layer, (k_bits, v_bits) in widths(plan).items():
        fits = layer not in skipped and k_bits <= k.bits and v_bits <= v.bits
        formats[layer] = (k, v) if fits else (FULL, FULL)
        if not fits:
            skipped.add(layer)
    return Export(_arguments(name, skipped), formats, plan)


def _boundary(plan: Plan) -> set[int]:
    layers = plan.model.layers
    if any(word in kind for kind in plan.model.stock.values() for word in HYBRID):
        return set()
    width = min(BOUNDARY, layers // 2)
    return {*range(width), *range(layers - width, layers)}


def _arguments(name: str, skipped: Collection[int]) -> str:
    more = ["--kv-cache-dtype-skip-layers", *map(str, sorted(skipped))] if skipped else []
    return " ".join([f"--kv-cache-dtype {name}", *more]) + "\n"


TARGET = Target(
    "vllm",
    express,
    f"{FP8_CAUTION}; int8 and int4 have one scale for a token of a head, TurboQuant is not our codec either: {AGAIN}",
)
