"""Decode attention of one layer on a GPU: packed pages against the best bf16 kernel at the same batch and context.

    python kernels/bench/bench_attend_gpu.py [--batches 1,8,32] [--contexts 1024,4096,32768,131072] [--out FOLDER]
        [--dry-run]

Heads of Llama-3-8B and of Llama-2-7B, one query. Every candidate is a CUDA graph, starts with a cold L2 cache, and is
checked against float64 on the dequantized tokens at the smallest context. Beside uniform widths there are keys in
runs of channels (MixKVQ) and tokens in two tiers (MiKV). The baseline is the faster of SDPA's flash kernel and our own
kernel without packing. `ratio` is its time over the candidate's; one above the ratio of the bytes read is an error, not
a result, and a candidate of another batch or context is refused.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import gpu
import torch
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import AttentionProblem, attend
from kvmix_kernels.pages import Channels, Packed, Plain
from kvmix_kernels.quantize import quantize
from kvmix_kernels.segments import Segments
from kvmix_kernels.sorted_tokens import Tiers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

SHAPES = {"dry": (1, 2, 128)} if gpu.DRY else {"llama-3-8b": (8, 4, 128), "llama-2-7b": (32, 1, 128)}
PAGE, GROUP = 128, 128
WIDTHS = {"8": (8, 8), "4": (4, 4), "3": (3, 3), "2": (2, 2), "K2 V4": (2, 4)}
RMS_LIMIT = 5e-3
RUNS = ((16, 16), (32, 4), (80, 2))
"""Channels and bits of keys in runs, as MixKVQ shares them out."""
BASELINES = ("sdpa flash bf16", "kvmix 16")
MEMORY_SHARE = 0.8


def candidates(keys: Tensor, values: Tensor) -> Iterator[tuple[str, Segments, Segments]]:
    """Yield the same tokens, stored in every way that is compared."""
    yield "16", Segments(None, None, keys), Segments(None, None, values)
    for name, (k_bits, v_bits) in WIDTHS.items():
        yield name, all_packed(pages("key", k_bits, keys)), all_packed(pages("value", v_bits, values))
    yield "K 16+4+2 V 2", all_packed(in_runs(keys)), all_packed(pages("value", 2, values))
    yield "tiers 16, 2", in_tiers("key", keys), in_tiers("value", values)


def pages(kind: str, bits: int, states: Tensor) -> Packed:
    """Return whole pages of `[B, H_kv, T, D]`."""
    layout = PageLayout(kind, bits, states.shape[3], PAGE, GROUP)  # type: ignore[arg-type]
    return Packed(layout, *quantize(states.unflatten(2, (-1, PAGE)), layout))


def in_runs(keys: Tensor) -> Channels:
    """Return keys in runs of channels, one order for all of them."""
    order = torch.randperm(keys.shape[3], device=keys.device)
    parts = keys[..., order].split([channels for channels, _ in RUNS], dim=-1)
    plain = Plain(parts[0].unflatten(2, (-1, PAGE)).transpose(-1, -2).contiguous())
    runs = (plain, *(pages("key", bits, part) for part, (_, bits) in zip(parts[1:], RUNS[1:], strict=True)))
    return Channels(order.to(torch.uint8).expand(*keys.shape[:2], 1, -1).contiguous(), keys.shape[2], runs)


def in_tiers(kind: str, states: Tensor) -> Segments:
    """Return about a fifth of the tokens in full precision, the others at 2 bits: the first, which costs the same."""
    batch, heads, tokens, _ = states.shape
    low = int(0.8 * tokens) // PAGE * PAGE
    tier = (torch.arange(tokens, device=states.device) >= tokens - low).to(torch.uint8).expand(batch, heads, -1)
    held = (states[:, :, : tokens - low], pages(kind, 2, states[:, :, tokens - low :]))
    return Segments(None, Tiers(tier, held), states[:, :, :0])


def all_packed(packed: Packed | Channels) -> Segments:
    """Return segments of nothing but pages."""
    runs = packed.runs if isinstance(packed, Channels) else (packed,)
    first = next(run for run in runs if isinstance(run, Packed))
    batch, heads = first.words.shape[:2]
    empty = torch.empty(batch, heads, 0, packed.width, dtype=torch.bfloat16, device=first.words.device)
    return Segments(None, packed, empty)


def stored_bytes(stored: object) -> int:
    """Return the bytes that attention has to read."""
    if isinstance(stored, Tensor):
        return stored.nbytes
    if isinstance(stored, Segments):
        return stored_bytes(stored.packed) + stored_bytes(stored.tail)
    if isinstance(stored, Packed):
        return stored.words.nbytes + stored.scales.nbytes
    if isinstance(stored, Channels):
        return stored.order.nbytes + sum(map(stored_bytes, stored.runs))
    if isinstance(stored, Tiers):
        return sum(map(stored_bytes, stored.held))
    return stored.states.nbytes if isinstance(stored, Plain) else 0


def flash(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend with SDPA, held to its flash kernel."""
    if gpu.DRY:
        return sdpa(query, keys, values, enable_gqa=True)
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
    """Return one row a candidate, all of the same batch and context; none if they do not fit the memory."""
    kv_heads, ratio, dim = SHAPES[shape]
    nbytes = 2 * batch * kv_heads * context * dim * 2
    if 3 * nbytes > MEMORY_SHARE * gpu.total_memory():
        print(f"\n{shape}, batch {batch}, context {context}: does not fit the memory, left out")
        return []
    torch.manual_seed(0)
    query = torch.randn(batch, kv_heads * ratio, 1, dim, dtype=torch.bfloat16, device=gpu.DEVICE)
    keys, values = (
        torch.randn(batch, kv_heads, context, dim, dtype=torch.bfloat16, device=gpu.DEVICE) for _ in range(2)
    )
    runs = {BASELINES[0]: functools.partial(flash, query, keys, values)}
    sizes = {BASELINES[0]: nbytes}
    for name, key, value in candidates(keys, values):
        if key.shape != keys.shape or value.shape != values.shape:
            raise SystemExit(f"{name} has keys {list(key.shape)} where others have {list(keys.shape)}: unequal work")
        run = functools.partial(attend, AttentionProblem(query, key, value, scaling=dim**-0.5))
        if checked:
            check(run()[0], query, key, value)
        runs[f"kvmix {name}"], sizes[f"kvmix {name}"] = run, stored_bytes(key) + stored_bytes(value)
    times = gpu.in_turns({name: gpu.captured(run) for name, run in runs.items()}, rounds)
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
    options = gpu.parse(parser)
    copy = gpu.copy_bandwidth()
    print(f"{gpu.name()}, a copy reaches {copy:.0f} GB/s")
    contexts = [int(context) for context in options.contexts.split(",")]
    for shape in SHAPES:
        for batch in (int(batch) for batch in options.batches.split(",")):
            for context in contexts:
                rows = measure(shape, batch, context, options.rounds, copy, checked=context == min(contexts))
                gpu.forget()
                gpu.save(rows, options.out)


if __name__ == "__main__":
    main()
