"""What the attention kernels become for a GPU that is not here: the table of kernels/README.md.

    python kernels/bench/aot_table.py [--capabilities 80,90]

One KV head with 4 query heads of 128 channels, one query each, pages of 128 tokens, one group a row of a page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import triton

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
from aot_cases import compile_attend, lane_instructions_per_code

CASES = {"2": (2, 2, None), "3": (3, 3, None), "4": (4, 4, None), "4, group 64": (4, 4, 64), "8": (8, 8, None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--capabilities", default="80,90")
    options = parser.parse_args()
    print(f"triton {triton.__version__}\n")
    print("| GPU | bits | warps | registers | spilled bytes | shared memory | lane instructions per code |")
    print("|---|---|---|---|---|---|---|")
    for capability in options.capabilities.split(","):
        for name, (k_bits, v_bits, group) in CASES.items():
            kernel = compile_attend(int(capability), k_bits, v_bits, group=group)[0]
            registers, spilled = kernel.usage
            cost = f"{lane_instructions_per_code(kernel):.2f}"
            shared = f"{kernel.shared / 1024:.0f} KiB"
            print(
                f"| sm_{capability} | {name} | {kernel.warps} | {registers} | {spilled} | {shared} | {cost} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
