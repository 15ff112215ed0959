"""llama.cpp: one cache type for the keys of all layers, and one for their values.

Source: llama.cpp, `kv_cache_types` in `common/arg.cpp` and the blocks of `ggml-common.h`: q4_0 and q8_0 are 32 values
that share a float16 scale, symmetric around zero. A head must be whole blocks (`llama_init_from_model`: "K cache type
q8_0 with block size 32 does not divide n_embd_head_k"). Quantized values need flash attention
(https://github.com/ggml-org/llama.cpp/issues/28524).
"""

from __future__ import annotations

from ..plan import Plan
from .target import Target, refuse

TYPES = {16: "f16", 8: "q8_0", 4: "q4_0"}
BLOCK = 32
"""Channels that share a scale in quantized types."""
WINDOWED = ("sliding", "chunked")
"""Words in the kinds of stock layers whose keys and values llama.cpp quantizes, too."""
ONE_WIDTH = "allocate with one of these widths, such as --k-bits 8 --v-bits 4"


def express(plan: Plan) -> str:
    """Return `--cache-type-k q4_0 --cache-type-v q8_0 --flash-attn on`. Raises ExportError."""
    known = ", ".join(f"{bits} ({name})" for bits, name in TYPES.items())
    widths = {index: tuple(tensor.bits for tensor, _ in layer.affine) for index, layer in plan.layers.items()}
    unknown = {index: plan.layers[index].short for index, pair in widths.items() if not set(pair) <= TYPES.keys()}
    refuse("llama.cpp", f"it has cache types for {known} bits", unknown, ONE_WIDTH)
    sizes = {index: plan.model.heads(index) for index, pair in widths.items() if set(pair) != {16}}
    broken = {index: f"heads of {heads}" for index, heads in sizes.items() if heads.key_dim % BLOCK}
    rule = f"it quantizes heads in whole blocks of {BLOCK} channels"
    refuse("llama.cpp", rule, broken, "allocate with --k-bits 16 --v-bits 16, or use this plan with kvmix itself")
    windowed = [index for index, kind in plan.model.stock.items() if any(word in kind for word in WINDOWED)]
    found = dict.fromkeys(windowed, "k16v16") | {index: layer.short for index, layer in plan.layers.items()}
    refuse("llama.cpp", "it stores all layers alike", found if len(set(found.values())) > 1 else {}, ONE_WIDTH)
    k, v = next(iter(widths.values()), (16, 16))
    flash = "" if v == 16 else " --flash-attn on"
    return f"--cache-type-k {TYPES[k]} --cache-type-v {TYPES[v]}{flash}\n"


TARGET = Target(
    "llama.cpp",
    express,
    "q4_0 and q8_0 are symmetric in blocks of 32 along a token's channels, for keys too, and there is no sink and no "
    "window in full precision: measure the quality again there",
)
