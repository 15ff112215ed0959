"""Decode attention of one layer on a CPU: packed pages against every torch formulation, in one process.

    python kernels/bench/bench_attend_cpu.py [--contexts 1024,4096,16384,65536] [--rounds 15] [--cpu-time] [--save]

Shape of Llama-3-8B: 8 KV heads, 4 query heads each, head_dim 128, one query. Pages of 128, groups of 64. Every
candidate attends to the same number of tokens; ours is checked against float64 on the dequantized tokens first.
Transform codes are of 2 nominal bits, with frames of 1024 and one exact token a page: all directions alike, or widths
that fall along each head as an allocation's do, a quarter of the directions without codes.
`ratio` is the best torch formulation's time over the candidate's. `--cpu-time` takes one thread and its own time, which
other work on the machine disturbs less. `--save` appends to results.csv.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable

import results
import torch
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import AttentionProblem, attend
from kvmix_kernels.pages import Coded, Packed
from kvmix_kernels.quantize import quantize
from kvmix_kernels.segments import Segments
from kvmix_kernels.transform import Frames, TransformBasis, encode
from kvmix_kernels.transform_layout import TransformLayout
from kvmix_kernels.vector_pages import VectorPages
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

KV_HEADS, RATIO, HEAD_DIM, PAGE, GROUP = 8, 4, 128, 128, 64
WIDTHS = {"16": (16, 16), "8": (8, 8), "4": (4, 4), "3": (3, 3), "2": (2, 2), "mixed K2 V4": (2, 4)}
TRANSFORMS = {
    "transform 2 alike": ("2" * 16,),
    "transform 2 falling": ("5443332221110000", "6544332211110000", "4433322222211110", "5544332221000000"),
}
"""Widths of the runs of KV heads, in turn."""
FRAME = 1024
RMS_LIMIT = 1e-3


def torch_formulations(query: Tensor, keys: Tensor, values: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return every way to write it in torch; `rows` packs the query heads of a KV head as query rows."""
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    rows = query.view(1, kv_heads, -1, head_dim)
    half = [x.bfloat16() for x in (query, rows, keys, values)]

    def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax((q @ k.mT).float() / math.sqrt(head_dim), dim=-1)
        return weights.to(v.dtype) @ v

    return {
        "sdpa gqa float32": lambda: sdpa(query, keys, values, enable_gqa=True),
        "sdpa gqa bfloat16": lambda: sdpa(half[0], half[2], half[3], enable_gqa=True),
        "sdpa rows float32": lambda: sdpa(rows, keys, values),
        "sdpa rows bfloat16": lambda: sdpa(half[1], half[2], half[3]),
        "matmul rows float32": lambda: matmul(rows, keys, values),
        "matmul rows bfloat16": lambda: matmul(half[1], half[2], half[3]),
    }


def pack(kind: str, bits: int, states: Tensor) -> Segments:
    """Return all tokens in packed pages, or all in full precision."""
    if bits == 16:
        return Segments(None, None, states)
    layout = PageLayout(kind, bits, states.shape[3], PAGE, GROUP)  # type: ignore[arg-type]
    words, scales = quantize(states.unflatten(2, (-1, PAGE)), layout)
    return Segments(None, Packed(layout, words, scales), states[:, :, :0])


def code(kind: str, widths: tuple[str, ...], states: Tensor) -> Segments:
    """Return all tokens as transform codes in a random basis; as many as there are pages, anywhere, are exact."""
    heads = tuple(tuple(map(int, widths[head % len(widths)])) for head in range(KV_HEADS))
    layout = TransformLayout(kind, heads, HEAD_DIM, PAGE, exact=1)  # type: ignore[arg-type]
    rotation = torch.linalg.qr(torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM))[0]
    frequencies = 10000.0 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)).double()
    basis = TransformBasis(
        layout,
        rotation.mT.contiguous(),
        rotation,
        torch.zeros(KV_HEADS, HEAD_DIM),
        torch.ones(KV_HEADS, HEAD_DIM),
        Frames(FRAME, frequencies) if kind == "key" else None,
    )
    pages = states.unflatten(2, (-1, PAGE))
    encoded = encode(pages, basis)
    drawn = torch.rand(states.shape[:3], generator=torch.Generator().manual_seed(0))
    places = drawn.topk(pages.shape[2]).indices.sort().values
    exact = states.gather(2, places[..., None].expand(*places.shape, HEAD_DIM))
    return Segments(None, Coded(basis, encoded.codes, encoded.scales, places.int(), exact), states[:, :, :0])


def stored_bytes(*tensors: Segments) -> int:
    """Return the bytes that attention has to read."""
    parts = [tensor.tail for tensor in tensors]
    for packed in (tensor.packed for tensor in tensors):
        if isinstance(packed, Coded):
            parts += [part for part in (packed.codes, packed.scales, packed.places, packed.exact) if part is not None]
        elif isinstance(packed, Packed):
            parts += [packed.words, packed.scales]
        elif isinstance(packed, VectorPages):
            parts += packed.parts.values()
    return sum(part.nbytes for part in parts)


def check(query: Tensor, key: Segments, value: Segments) -> float:
    """Return the relative RMS error against float64 on the dequantized tokens; refuse a wrong kernel."""
    rows, scaling = query.view(1, key.shape[1], -1, query.shape[3]).double(), query.shape[3] ** -0.5
    k, v = (tensor.dequantize().double() for tensor in (key, value))
    expected = (torch.softmax(rows @ k.mT * scaling, -1) @ v).view(query.shape)
    got = attend(AttentionProblem(query, key, value, scaling))[0].double()
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < RMS_LIMIT:
        raise SystemExit(f"wrong result: RMS error {error:.2g}; nothing is timed")
    return error


def measure(context: int, rounds: int, cpu_time: bool = False) -> list[dict[str, object]]:
    """Return one row a candidate."""
    torch.manual_seed(0)
    query = torch.randn(1, KV_HEADS * RATIO, 1, HEAD_DIM)
    keys, values = (torch.randn(1, KV_HEADS, context, HEAD_DIM) for _ in range(2))
    candidates: dict[str, Callable[[], object]] = {**torch_formulations(query, keys, values)}
    names = list(candidates)
    sizes = dict.fromkeys(names, 0)
    sizes |= {name: (keys.nbytes + values.nbytes) // (2 if "bfloat16" in name else 1) for name in names}
    errors = {}
    ours = {
        f"kvmix {name}": (pack("key", k_bits, keys), pack("value", v_bits, values))
        for name, (k_bits, v_bits) in WIDTHS.items()
    }
    ours |= {
        f"kvmix {name}": (code("key", widths, keys), code("value", widths, values))
        for name, widths in TRANSFORMS.items()
    }
    for name, (key, value) in ours.items():
        errors[name], sizes[name] = check(query, key, value), stored_bytes(key, value)
        candidates[name] = functools.partial(attend, AttentionProblem(query, key, value, scaling=HEAD_DIM**-0.5))
    times = results.in_turns(candidates, rounds, clock=time.thread_time if cpu_time else time.perf_counter)
    best = min(times[name] for name in names)
    print(f"\ncontext {context}, {torch.get_num_threads()} threads; best torch formulation {best:.2f} ms")
    rows = []
    for name, ms in times.items():
        speed = sizes[name] / ms / 1e6
        print(f"  {name:26} {ms:8.2f} ms {speed:7.1f} GB/s  {best / ms:6.2f}x", f"RMS {errors.get(name, 0):.1e}")
        shape = f"{KV_HEADS}x{RATIO}x{HEAD_DIM}"
        row = {"op": "attend-cpu-time" if cpu_time else "attend", "shape": shape, "context": context, "name": name}
        rows.append({**row, "ms": round(ms, 3), "gb_per_s": round(speed, 2), "ratio": round(best / ms, 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--contexts", default="1024,4096,16384,65536")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    contexts = [int(context) for context in options.contexts.split(",")]
    rows = [row for context in contexts for row in measure(context, options.rounds, options.cpu_time)]
    if options.save:
        results.append(rows)


if __name__ == "__main__":
    main()
