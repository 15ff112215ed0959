"""What the attention kernels become for a GPU that is not here: the table of kernels/README.md.

    python kernels/bench/aot_table.py [--capabilities 80,90]

One KV head with 4 query heads of 128 channels, one query each, pages of 128 tokens, one group a row of a page; then
keys in runs of channels beside values of 2 bits, and small pages, of which 64 tokens are read together. A second table
is of transform codes: of the same heads, with exact tokens, and for each plane of 4, 2 and 1 bits. A third is of the
blocks of a serving engine, groups along channels for keys as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
from aot_cases import (
    PAGE,
    RUNS,
    compile_attend,
    compile_blocks,
    compile_coded,
    compile_coded_blocks,
    compile_coded_store,
    compile_encode,
    lane_instructions_per_code,
    lane_instructions_per_plane_code,
    plane_loops,
)


def _channels(runs: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(str(channels) for channels, _ in runs) + " channels"


CASES: dict[str, tuple[Any, int, dict[str, int]]] = {
    **{str(bits): (bits, bits, {}) for bits in (2, 3, 4)},
    "4, group 64": (4, 4, {"group": 64}),
    "8": (8, 8, {}),
    **{f"K {name} ({_channels(runs)}), V 2": (runs, 2, {}) for name, runs in RUNS.items()},
    "2, page 32, group 32": (2, 2, {"page": 32, "group": 32}),
    "K 3 V 4, page 32, group 32": (3, 4, {"page": 32, "group": 32}),
}
SMALL_PAGES = 64
IN_BLOCKS: dict[str, tuple[int, int, dict[str, int]]] = {
    **{str(bits): (bits, bits, {}) for bits in (2, 3, 4)},
    "4, group 64": (4, 4, {"group": 64}),
    "8": (8, 8, {}),
    "K 3 V 2, group 32": (3, 2, {"group": 32}),
    "16": (16, 16, {}),
}


def _table(capabilities: list[int], compiled: Any, cases: Mapping[str, tuple[Any, int, dict[str, int]]]) -> None:
    """Print what a kernel for packed keys and values becomes, by the bits of keys and of values."""
    print("| GPU | bits | warps | registers | spilled bytes | shared memory | lane instructions per code |")
    print("|---|---|---|---|---|---|---|")
    for capability in capabilities:
        for name, (keys, v_bits, shape) in cases.items():
            kernel = compiled(capability, keys, v_bits, **shape)[0]
            registers, spilled = kernel.usage
            tokens = max(SMALL_PAGES, shape.get("page", PAGE))
            cost = f"{lane_instructions_per_code(kernel, tokens=tokens):.2f}"
            shared = f"{kernel.shared / 1024:.0f} KiB"
            print(
                f"| sm_{capability} | {name} | {kernel.warps} | {registers} | {spilled} | {shared} | {cost} |",
                flush=True,
            )


def _transform_table(capabilities: list[int]) -> None:
    """Print what the kernels for transform codes become."""
    print(
        "| GPU | kernel | warps | registers | spilled bytes | shared memory | lane instructions per code of a plane |"
    )
    print("|---|---|---|---|---|---|---|")
    for capability in capabilities:
        kernels = {"attend": compile_coded(capability)}
        kernels |= {f"encode {kind}s": compile_encode(capability, kind) for kind in ("key", "value")}
        kernels["attend to blocks"] = compile_coded_blocks(capability)
        kernels |= {f"store {kind}s in blocks": compile_coded_store(capability, kind) for kind in ("key", "value")}
        for name, kernel in kernels.items():
            registers, spilled = kernel.usage
            costs = {}
            if name.startswith("attend"):
                for (kind, bits), loop in plane_loops(kernel).items():
                    costs.setdefault(kind, []).append(f"{lane_instructions_per_plane_code(kernel, loop):.2f} ({bits})")
            cost = "; ".join(f"{kind}s {', '.join(each)}" for kind, each in costs.items())
            shared = f"{kernel.shared / 1024:.0f} KiB"
            print(f"| sm_{capability} | {name} | {kernel.warps} | {registers} | {spilled} | {shared} | {cost} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--capabilities", default="80,90")
    parser.add_argument("--transform", action="store_true", help="only the table of transform codes")
    parser.add_argument("--blocks", action="store_true", help="only the table of an engine's blocks")
    options = parser.parse_args()
    print(f"triton {triton.__version__}\n")
    capabilities = [int(each) for each in options.capabilities.split(",")]
    if options.transform:
        _transform_table(capabilities)
        return
    if options.blocks:
        _table(capabilities, compile_blocks, IN_BLOCKS)
        return
    _table(capabilities, compile_attend, CASES)
    print()
    _transform_table(capabilities)
    print()
    _table(capabilities, compile_blocks, IN_BLOCKS)


if __name__ == "__main__":
    main()
