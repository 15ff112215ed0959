"""llama.cpp: one cache type for the keys of all layers, and one for their values; ik_llama.cpp: others at both ends.

Source: llama.cpp at 0c1e570, `kv_cache_types` in `common/arg.cpp` and the blocks of `ggml-common.h`: 32 values that
share a float16 scale. A head must be whole blocks (`llama_init_from_model`: "K cache type q8_0 with block size 32 does
not divide n_embd_head_k"). Quantized values need flash attention
(https://github.com/ggml-org/llama.cpp/issues/28524). Heads of a multiple of 64 channels are turned by a Hadamard matrix
first (`llama_kv_cache::build_input_k_rot`, https://github.com/ggml-org/llama.cpp/pull/21038).

ik_llama.cpp at 8337e4c: `--cache-type-k-first TYPE,N` and its kin (https://github.com/ikawrakow/ik_llama.cpp/pull/1599),
and `--k-cache-hadamard`, which it takes only if the type of most layers is quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import ExportError, did_you_mean
from ..plan import Plan
from ..plan.engines.formats import GGML, GGML_BLOCK, EngineFormat
from .target import AGAIN, Export, FormatPair, Target, quantizes, refuse, widths

OF_CHOICE = ("q4_0", "q8_0", "f16")
"""Types to choose from where none is named, by their width."""
WINDOWED = ("sliding", "chunked")
"""Words in the kinds of stock layers whose keys and values llama.cpp quantizes, too."""
KEYS_TURNED, VALUES_TURNED = 2**16, 64
"""Most channels that llama.cpp turns together."""
TURNED = 512
"""The same of ik_llama.cpp."""
NARROWER = "allocate with one of its widths everywhere, such as --k-bits 8 --v-bits 4, or name --format q8_0"


@dataclass(frozen=True)
class _Types:
    """Types of one tensor, keys or values, in all layers: those at both ends, and the others.

    Attributes:
        middle: name of the type of all layers but those.
        first: name and number of layers at the start.
        last: name and number of layers at the end.
    """

    middle: str
    first: tuple[str, int] = ("", 0)
    last: tuple[str, int] = ("", 0)

    def at(self, layer: int, layers: int) -> str:
        """Return the name of a layer's type."""
        if layer < self.first[1]:
            return self.first[0]
        return self.last[0] if layer >= layers - self.last[1] else self.middle

    def arguments(self, kind: str) -> Iterator[str]:
        """Yield `--cache-type-k q4_0`, and `--cache-type-k-first q8_0,2`."""
        yield f"--cache-type-{kind} {self.middle}"
        for end, (name, count) in (("first", self.first), ("last", self.last)):
            if count:
                yield f"--cache-type-{kind}-{end} {name},{count}"


def express(plan: Plan, form: str | None) -> Export:
    """Return `--cache-type-k q4_0 --cache-type-v q8_0 --flash-attn on`. Raises ExportError."""
    needs = _needs(plan, form, "llama.cpp")
    chosen = [_Types(name) for name in _named(form)] or [_Types(max(need.values(), key=_width)) for need in needs]
    if all(types.middle == "f16" for types in chosen) and quantizes(plan):
        windowed = dict.fromkeys(_windowed(plan), "k16v16")
        found = windowed | {index: layer.short for index, layer in plan.layers.items()}
        refuse("llama.cpp", "it stores all layers alike", found, NARROWER)
    return _export(plan, chosen, (KEYS_TURNED, VALUES_TURNED), ())


def express_ends(plan: Plan, form: str | None) -> Export:
    """Return `--cache-type-k q4_0 --cache-type-k-first q8_0,2 ...`. Raises ExportError."""
    needs = _needs(plan, form, "ik_llama")
    chosen = [_Types(name) for name in _named(form)] or [_least(need, plan.model.layers) for need in needs]
    turned = tuple(TURNED if types.middle != "f16" else 0 for types in chosen)
    hadamard = [f"--{kind}-cache-hadamard" for kind, most in zip("kv", turned, strict=True) if most]
    return _export(plan, chosen, (turned[0], turned[1]), hadamard)


def _named(form: str | None) -> list[str]:
    """Return the types of `--format q8_0` or `--format q8_0,q4_0`; none if there is none."""
    if form is None:
        return []
    names = form.split(",")
    if len(names) > 2 or not set(names) <= GGML.keys():
        wrong = next((name for name in names if name not in GGML), form)
        raise ExportError(
            f"no cache type '{wrong}'{did_you_mean(wrong, GGML)}; give one of {', '.join(GGML)}, or two as K,V"
        )
    return [names[0], names[-1]]


def _needs(plan: Plan, form: str | None, engine: str) -> tuple[dict[int, str], dict[int, str]]:
    """Return, for keys and for values, the narrowest type of each layer that has as many bits as the plan."""
    pairs = widths(plan)
    k, v = (
        {layer: next(name for name in OF_CHOICE if GGML[name].bits >= pair[kind]) for layer, pair in pairs.items()}
        | dict.fromkeys(_windowed(plan), "f16")
        for kind in (0, 1)
    )
    wanted = _named(form) or [*k.values(), *v.values()]
    if any(name != "f16" for name in wanted):
        sizes = {index: plan.model.heads(index) for index in pairs}
        broken = {index: f"heads of {heads}" for index, heads in sizes.items() if heads.key_dim % GGML_BLOCK}
        rule = f"it quantizes heads in whole blocks of {GGML_BLOCK} channels"
        refuse(engine, rule, broken, "allocate with --k-bits 16 --v-bits 16, or use this plan with kvmix itself")
    return k, v


def _windowed(plan: Plan) -> list[int]:
    return [index for index, kind in plan.model.stock.items() if any(word in kind for word in WINDOWED)]


def _width(name: str) -> int:
    return GGML[name].bits


def _least(need: Mapping[int, str], layers: int) -> _Types:
    """Return the types of fewest bytes in which no layer has less than it needs; of such, those of the fewest ends.

    Wherever the ends begin, each part has the widest type that one of its layers needs.
    """
    wanted = [need.get(layer, "") for layer in range(layers)]
    cuts = [layer for layer in range(layers + 1) if layer in (0, layers) or wanted[layer] != wanted[layer - 1]]

    def parts(head: int, tail: int) -> tuple[float, int, _Types]:
        spans = (0, head), (head, tail), (tail, layers)
        first, middle, last = (_widest(wanted[start:end]) for start, end in spans)
        return (
            sum(
                GGML[name].stored_bits(GGML_BLOCK) * sum(map(bool, wanted[start:end]))
                for name, (start, end) in zip((first, middle, last), spans, strict=True)
            ),
            head + layers - tail,
            _Types(middle, (first, head), (last, layers - tail)),
        )

    found = [parts(head, tail) for head in cuts for tail in cuts if head < tail]
    return min(found, key=lambda each: each[:2])[2]


def _widest(names: Iterable[str]) -> str:
    return max((name for name in names if name), key=_width, default=OF_CHOICE[0])


def _export(plan: Plan, chosen: Sequence[_Types], turned: tuple[int, int], more: Sequence[str]) -> Export:
    k, v = chosen
    arguments = [*k.arguments("k"), *v.arguments("v"), *more]
    if any(name not in ("f16", "") for name in (v.middle, v.first[0], v.last[0])):
        arguments.append("--flash-attn on")
    layers = plan.model.layers
    formats: dict[int, FormatPair] = {
        layer: (_turned(k.at(layer, layers), turned[0]), _turned(v.at(layer, layers), turned[1]))
        for layer in plan.layers
    }
    return Export(" ".join(arguments) + "\n", formats, plan)


def _turned(name: str, most: int) -> EngineFormat:
    return GGML[name] if name == "f16" else replace(GGML[name], turned=most)


_BLOCKS = (
    "types are blocks of 32 along a token's channels, for keys too, symmetric unless their name ends in 1, and there "
    f"is no sink and no window in full precision: {AGAIN}"
)
TARGET = Target("llama.cpp", express, _BLOCKS)
ENDS = Target("ik_llama", express_ends, _BLOCKS)
