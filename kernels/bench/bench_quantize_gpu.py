"""Quantizing and packing on a GPU, against a copy: bytes read and written, as a share of copy bandwidth.

    python kernels/bench/bench_quantize_gpu.py [--out FOLDER] [--dry-run]

256 pages of 128 tokens, 8 KV heads of 128 channels, batch 8, in bf16, as a long prompt brings them,
into a cache that has room for them.
"""

from __future__ import annotations

import argparse
import functools

import gpu
import torch
from kvmix_kernels import BITS, PageLayout
from kvmix_kernels.quantize import quantize_into

BATCH, KV_HEADS, PAGES, PAGE, HEAD_DIM = (1, 1, 1, 128, 128) if gpu.DRY else (8, 8, 256, 128, 128)


def room_for(layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Make words and scales of a cache."""
    lead, dtype = (BATCH, KV_HEADS, PAGES), getattr(torch, layout.scale_dtype)
    words = torch.empty(*lead, *layout.words_shape, dtype=torch.int16, device=gpu.DEVICE)
    return words, torch.empty(*lead, *layout.scales_shape, dtype=dtype, device=gpu.DEVICE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options = gpu.parse(parser)
    copy = gpu.copy_bandwidth()
    pages = torch.randn(BATCH, KV_HEADS, PAGES, PAGE, HEAD_DIM, dtype=torch.bfloat16, device=gpu.DEVICE)
    candidates, sizes = {}, {}
    for kind in ("key", "value"):
        for bits in BITS:
            for group in (32, 64, 128):
                layout = PageLayout(kind, bits, HEAD_DIM, PAGE, group)  # type: ignore[arg-type]
                name = f"{kind} {bits} bits, group {group}"
                candidates[name] = functools.partial(quantize_into, pages, layout, *room_for(layout))
                sizes[name] = pages.nbytes + BATCH * KV_HEADS * PAGES * layout.nbytes
    rows = []
    for name, ms in gpu.in_turns(candidates, options.rounds).items():
        speed = sizes[name] / ms / 1e6
        print(f"  {name:24} {ms * 1e3:9.1f} us {speed:8.1f} GB/s {speed / copy:6.1%} of copy")
        row = {"op": "quantize-gpu", "shape": f"{BATCH}x{KV_HEADS}x{HEAD_DIM}", "context": PAGES * PAGE, "name": name}
        rows.append({**row, "ms": round(ms, 5), "gb_per_s": round(speed, 1), "ratio": round(speed / copy, 3)})
    gpu.save(rows, options.out)


if __name__ == "__main__":
    main()
