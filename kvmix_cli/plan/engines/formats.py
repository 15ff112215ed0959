"""Formats in which other engines store the keys or the values of a token: names, widths and bytes.

Read from vLLM 0.32.0 (`vllm/v1/kv_cache_interface.py`, `customize_spec` of its attention backends and
`quantization/turboquant/config.py`) and from llama.cpp at 0c1e570 (`ggml/src/ggml-common.h`, `kv_cache_types` in
`common/arg.cpp`). What each does to numbers is in `cache/baselines/rounding.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvmix_kernels.layout import FULL_PRECISION_BITS


@dataclass(frozen=True)
class EngineFormat:
    """A format of one tensor, keys or values, whose tokens and heads stand alone.

    Attributes:
        name: as the engine's options have it, where it is one; TurboQuant's keys and values are told apart.
        bits: width of a code; 16 keeps full precision.
        block: channels that share a scale; None for all of a head.
        block_bytes: bytes of what a block has beside its codes.
        power_of_two: heads must have a power of two of channels.
        turned: most channels of the Hadamard matrix that the engine turns a head with before it stores it; 0 for none.
    """

    name: str
    bits: int
    block: int | None = None
    block_bytes: int = 0
    power_of_two: bool = False
    turned: int = 0

    @property
    def is_full(self) -> bool:
        """Return whether it keeps full precision."""
        return self.bits == FULL_PRECISION_BITS

    def takes(self, dim: int) -> bool:
        """Return whether heads of so many channels can be stored."""
        return dim % (self.block or 1) == 0 and (not self.power_of_two or dim & (dim - 1) == 0)

    def nbytes(self, dim: int) -> int:
        """Return the bytes of one token of one head of `dim` channels."""
        return -(-dim * self.bits // 8) + dim // (self.block or dim) * self.block_bytes

    def stored_bits(self, dim: int) -> float:
        """Return the bits of an element, scales included."""
        return 8 * self.nbytes(dim) / dim


GGML_BLOCK: Final = 32
"""Channels of a block of llama.cpp; numbers of full precision stand alone."""
GGML: Final = {
    each.name: each
    for each in (
        EngineFormat("f16", FULL_PRECISION_BITS),
        EngineFormat("q8_0", 8, GGML_BLOCK, 2),
        EngineFormat("q5_1", 5, GGML_BLOCK, 4),
        EngineFormat("q5_0", 5, GGML_BLOCK, 2),
        EngineFormat("q4_1", 4, GGML_BLOCK, 4),
        EngineFormat("q4_0", 4, GGML_BLOCK, 2),
    )
}
"""llama.cpp: a float16 scale in every block, and a float16 minimum in those whose name ends in 1."""
LEAST_TURN: Final = 64
"""Channels of the smallest Hadamard matrix of llama.cpp, which leaves heads alone that are no multiple of it."""

FULL: Final = EngineFormat("auto", FULL_PRECISION_BITS)
"""The dtype of the model."""
FP8: Final = EngineFormat("fp8", 8)
"""e4m3, one scale a tensor."""
NVFP4: Final = EngineFormat("nvfp4", 4, 16, 1)
"""e2m1, an e4m3 scale for 16 channels."""

_turbo_keys = {bits: EngineFormat(f"turboquant_k{bits}", bits, None, 2, power_of_two=True) for bits in (3, 4)}
_turbo_values = {bits: EngineFormat(f"turboquant_v{bits}", bits, None, 4, power_of_two=True) for bits in (3, 4)}
_of_heads = {
    f"{kind}_per_token_head": EngineFormat(f"{kind}_per_token_head", bits, None, 4)
    for kind, bits in (("int8", 8), ("fp8", 8), ("int4", 4))
}

VLLM: Final[dict[str, tuple[EngineFormat, EngineFormat]]] = {
    "fp8": (FP8, FP8),
    "turboquant_k8v4": (FP8, _turbo_values[4]),
    "turboquant_4bit_nc": (_turbo_keys[4], _turbo_values[4]),
    "turboquant_k3v4_nc": (_turbo_keys[3], _turbo_values[4]),
    "turboquant_3bit_nc": (_turbo_keys[3], _turbo_values[3]),
    **{name: (each, each) for name, each in _of_heads.items()},
    "nvfp4": (NVFP4, NVFP4),
}
"""Keys and values, by the name of `--kv-cache-dtype`.

Scales by token and head are one float32. TurboQuant has a float16 norm for keys, and a float16 scale and minimum for
values; `nc` stands for keys whose norm is corrected, which costs no byte.
"""
MODELOPT: Final = {"FP8": FP8, "NVFP4": NVFP4}
"""By the name of `quant_algo`."""
