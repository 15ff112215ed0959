"""Decode attention of one layer on a GPU: packed pages against the best bf16 kernel at the same batch and context.

    python kernels/bench/bench_attend_gpu.py [--batches 1,8,32] [--contexts 1024,4096,32768,131072] [--out FOLDER]

Heads of Llama-3-8B and of Llama-2-7B, one query. Every candidate is a CUDA graph, starts with a cold L2 cache, and is
checked against float64 on the dequantized tokens at the smallest context. The baseline is the faster of SDPA's flash
kernel and our own kernel without packing. `ratio` is its time over the candidate's; one above the ratio of the bytes
read is an error, not a result.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import gpu
import torch
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import attend
from kvmix_kernels.pages import Packed
from kvmix_kernels.quantize import quantize
from kvmix_kernels.segments import Segments
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

SHAPES = {"llama-3-8b": (8, 4, 128), "llama-2-7b": (32, 1, 128)}
PAGE, GROUP = 128, 128
WIDTHS = {"8": (8, 8), "4": (4, 4), "3": (3, 3), "2": (2, 2), "K2 V4": (2, 4)}
RMS_LIMIT = 5e-3
BASELINES = ("sdpa flash bf16", "kvmix 16")
MEMORY_SHARE = 0.8


def pack(kind: str, bits: int, states: Tensor) -> Segments:
    """All tokens in packed pages, or all in full precision."""
    if bits == 16:
        return Segments(None, None, states)
    layout = PageLayout(kind, bits, states.shape[3], PAGE, GROUP)  # type: ignore[arg-type]
    words, scales = quantize(states.unflatten(2, (-1, PAGE)), layout)
    return Segments(None, Packed(layout, words, scales), states[:, :, :0])


def stored_bytes(*tensors: Segments) -> int:
    """Bytes that attention has to read."""
    packed = [part for tensor in tensors if tensor.packed for part in (tensor.packed.words, tensor.packed.scales)]
    return sum(part.nbytes for part in (*packed, *(tensor.tail for tensor in tensors)))


def flash(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """SDPA, held to its flash kernel."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(query, keys, values, enable_gqa=query.shape[1] != keys.shape[1])


def check(got: Tensor, query: Tensor, key: Segments, value: Segments) -> None:
    """Refuse to time a wrong kernel: relative RMS error against float64 on the dequantized tokens."""
    ratio = query.shape[1] // key.shape[1]
    k, v = (tensor.read(0, key.shape[2], torch.float64).repeat_interleave(ratio, 1) for tensor in (key, value))
    expected = torch.softmax(query.double() @ k.mT * query.shape[3] ** -0.5, -1) @ v
    error = ((got.double() - expected).norm() / expected.norm()).item()
    if not error < RMS_LIMIT:
        raise SystemExit(f"wrong result: RMS error {error:.2g}; nothing is timed")


def measure(shape: str, batch: int, context: int, rounds: int, copy: float, checked: bool) -> list[dict[str, object]]:
    """One row a candidate, all of the same batch and context; none if they do not fit the memory."""
    kv_heads, ratio, dim = SHAPES[shape]
    nbytes = 2 * batch * kv_heads * context * dim * 2
    if 2.5 * nbytes > MEMORY_SHARE * torch.cuda.get_device_properties(0).total_memory:
        print(f"\n{shape}, batch {batch}, context {context}: does not fit the memory, left out")
        return []
    torch.manual_seed(0)
    query = torch.randn(batch, kv_heads * ratio, 1, dim, dtype=torch.bfloat16, device="cuda")
    keys, values = (torch.randn(batch, kv_heads, context, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    candidates = {BASELINES[0]: functools.partial(flash, query, keys, values)}
    sizes = {BASELINES[0]: nbytes}
    for name, (k_bits, v_bits) in {"16": (16, 16), **WIDTHS}.items():
        key, value = pack("key", k_bits, keys), pack("value", v_bits, values)
        run = functools.partial(attend, query, key, value, scaling=dim**-0.5)
        if checked:
            check(run(), query, key, value)
        candidates[f"kvmix {name}"], sizes[f"kvmix {name}"] = run, stored_bytes(key, value)
    times = gpu.in_turns({name: gpu.captured(run) for name, run in candidates.items()}, rounds)
    best = min(times[name] for name in BASELINES)
    print(f"\n{shape}, batch {batch}, context {context}; best bf16 kernel {best * 1e3:.1f} us")
    rows = []
    for name, ms in times.items():
        speed, gain, most = sizes[name] / ms / 1e6, best / ms, nbytes / sizes[name]
        note = "  ERROR: faster than its bytes allow" if gain > most * 1.02 else ""
        print(f"  {name:18} {ms * 1e3:9.1f} us {speed:8.1f} GB/s {speed / copy:6.1%} of copy {gain:6.2f}x{note}")
        row = {"op": "attend-gpu", "shape": f"{shape} batch {batch}", "context": context, "name": name + note}
        rows.append({**row, "ms": round(ms, 5), "gb_per_s": round(speed, 1), "ratio": round(gain, 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--contexts", default="1024,4096,32768,131072")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="folder to write results.csv to")
    options = parser.parse_args()
    gpu.require_gpu()
    copy = gpu.copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, a copy reaches {copy:.0f} GB/s")
    contexts = [int(context) for context in options.contexts.split(",")]
    for shape in SHAPES:
        for batch in (int(batch) for batch in options.batches.split(",")):
            for context in contexts:
                rows = measure(shape, batch, context, options.rounds, copy, checked=context == min(contexts))
                torch.cuda.empty_cache()
                gpu.save(rows, options.out)


if __name__ == "__main__":
    main()
