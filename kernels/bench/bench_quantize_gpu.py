"""Quantizing and packing on a GPU, against a copy: bytes read and written, as a share of copy bandwidth.

    python kernels/bench/bench_quantize_gpu.py [--out FOLDER]

256 pages of 128 tokens, 8 KV heads of 128 channels, batch 8, in bf16, as a long prompt brings them.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import gpu
import torch
from kvmix_kernels import BITS, PageLayout
from kvmix_kernels.quantize import quantize

BATCH, KV_HEADS, PAGES, PAGE, HEAD_DIM = 8, 8, 256, 128, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="folder to write results.csv to")
    options = parser.parse_args()
    gpu.require_gpu()
    copy = gpu.copy_bandwidth()
    pages = torch.randn(BATCH, KV_HEADS, PAGES, PAGE, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    candidates, sizes = {}, {}
    for kind in ("key", "value"):
        for bits in BITS:
            for group in (32, 64, 128):
                layout = PageLayout(kind, bits, HEAD_DIM, PAGE, group)  # type: ignore[arg-type]
                name = f"{kind} {bits} bits, group {group}"
                candidates[name] = functools.partial(quantize, pages, layout)
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
