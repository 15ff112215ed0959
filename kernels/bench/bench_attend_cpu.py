"""Decode attention of one layer on a CPU: packed pages against every torch formulation, in one process.

    python kernels/bench/bench_attend_cpu.py [--contexts 1024,4096,16384,65536] [--rounds 15] [--save]

Shape of Llama-3-8B: 8 KV heads, 4 query heads each, head_dim 128, one query. Pages of 128, groups of 64. Every
candidate attends to the same number of tokens; ours is checked against float64 on the dequantized tokens first.
`ratio` is the best torch formulation's time over the candidate's. `--save` appends to results.csv.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable

import results
import torch
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import AttentionProblem, attend
from kvmix_kernels.quantize import quantize
from kvmix_kernels.segments import Packed, Segments
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

KV_HEADS, RATIO, HEAD_DIM, PAGE, GROUP = 8, 4, 128, 128, 64
WIDTHS = {"16": (16, 16), "8": (8, 8), "4": (4, 4), "3": (3, 3), "2": (2, 2), "mixed K2 V4": (2, 4)}
RMS_LIMIT = 1e-3


def torch_formulations(query: Tensor, keys: Tensor, values: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return every way to write it in torch; `rows` packs the query heads of a KV head as query rows."""
    rows = query.view(1, KV_HEADS, RATIO, HEAD_DIM)
    half = [x.bfloat16() for x in (query, rows, keys, values)]

    def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax((q @ k.mT).float() / math.sqrt(HEAD_DIM), dim=-1)
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
    layout = PageLayout(kind, bits, HEAD_DIM, PAGE, GROUP)  # type: ignore[arg-type]
    words, scales = quantize(states.unflatten(2, (-1, PAGE)), layout)
    return Segments(None, Packed(layout, words, scales), states[:, :, :0])


def stored_bytes(*tensors: Segments) -> int:
    """Return the bytes that attention has to read."""
    packed = [part for tensor in tensors if tensor.packed for part in (tensor.packed.words, tensor.packed.scales)]
    return sum(part.nbytes for part in (*packed, *(tensor.tail for tensor in tensors)))


def check(query: Tensor, key: Segments, value: Segments) -> float:
    """Return the relative RMS error against float64 on the dequantized tokens; refuse a wrong kernel."""
    k, v = (tensor.dequantize().double().repeat_interleave(RATIO, 1) for tensor in (key, value))
    expected = torch.softmax(query.double() @ k.mT / math.sqrt(HEAD_DIM), -1) @ v
    got = attend(AttentionProblem(query, key, value, scaling=HEAD_DIM**-0.5))[0].double()
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < RMS_LIMIT:
        raise SystemExit(f"wrong result: RMS error {error:.2g}; nothing is timed")
    return error


def measure(context: int, rounds: int) -> list[dict[str, object]]:
    """Return one row a candidate."""
    torch.manual_seed(0)
    query = torch.randn(1, KV_HEADS * RATIO, 1, HEAD_DIM)
    keys, values = (torch.randn(1, KV_HEADS, context, HEAD_DIM) for _ in range(2))
    candidates: dict[str, Callable[[], object]] = {**torch_formulations(query, keys, values)}
    names = list(candidates)
    sizes = dict.fromkeys(names, 0)
    sizes |= {name: (keys.nbytes + values.nbytes) // (2 if "bfloat16" in name else 1) for name in names}
    errors = {}
    for name, (k_bits, v_bits) in WIDTHS.items():
        key, value = pack("key", k_bits, keys), pack("value", v_bits, values)
        name = f"kvmix {name}"
        errors[name], sizes[name] = check(query, key, value), stored_bytes(key, value)
        candidates[name] = functools.partial(attend, AttentionProblem(query, key, value, scaling=HEAD_DIM**-0.5))
    times = results.in_turns(candidates, rounds)
    best = min(times[name] for name in names)
    print(f"\ncontext {context}, {torch.get_num_threads()} threads; best torch formulation {best:.2f} ms")
    rows = []
    for name, ms in times.items():
        speed = sizes[name] / ms / 1e6
        print(f"  {name:22} {ms:8.2f} ms {speed:7.1f} GB/s  {best / ms:6.2f}x", f"RMS {errors.get(name, 0):.1e}")
        shape = f"{KV_HEADS}x{RATIO}x{HEAD_DIM}"
        row = {"op": "attend", "shape": shape, "context": context, "name": name}
        rows.append({**row, "ms": round(ms, 3), "gb_per_s": round(speed, 2), "ratio": round(best / ms, 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--contexts", default="1024,4096,16384,65536")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    rows = [row for context in options.contexts.split(",") for row in measure(int(context), options.rounds)]
    if options.save:
        results.append(rows)


if __name__ == "__main__":
    main()
