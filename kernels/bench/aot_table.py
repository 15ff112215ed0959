"""What the attention kernels become for a GPU that is not here: the table of kernels/README.md.

    python kernels/bench/aot_table.py [--capabilities 80,90]

One KV head with 4 query heads of 128 channels, one query each, pages of 128 tokens, one group a row of a page; then
keys in runs of channels beside values of 2 bits, and small pages, of which 64 tokens are read together.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import triton

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
from aot_cases import PAGE, RUNS, compile_attend, lane_instructions_per_code


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--capabilities", default="80,90")
    options = parser.parse_args()
    print(f"triton {triton.__version__}\n")
    print("| GPU | bits | warps | registers | spilled bytes | shared memory | lane instructions per code |")
    print("|---|---|---|---|---|---|---|")
    for capability in options.capabilities.split(","):
        for name, (keys, v_bits, options) in CASES.items():
            kernel = compile_attend(int(capability), keys, v_bits, **options)[0]
            registers, spilled = kernel.usage
            tokens = max(SMALL_PAGES, options.get("page", PAGE))
            cost = f"{lane_instructions_per_code(kernel, tokens=tokens):.2f}"
            shared = f"{kernel.shared / 1024:.0f} KiB"
            print(
                f"| sm_{capability} | {name} | {kernel.warps} | {registers} | {spilled} | {shared} | {cost} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
