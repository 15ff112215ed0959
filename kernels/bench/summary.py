"""A folder's results.csv as Markdown tables, in its summary.md.

python kernels/bench/summary.py FOLDER
"""

from __future__ import annotations

import csv
import sys
from itertools import groupby
from pathlib import Path

SHOWN = ("shape", "context", "name", "ms", "gb_per_s", "ratio")


def tables(rows: list[dict[str, str]]) -> list[str]:
    """Yield a heading and a table for each operation, machine and date."""
    lines: list[str] = []
    for title, group in groupby(rows, key=lambda row: (row["op"], row["machine"], row["torch"], row["date"])):
        lines += ["", f"## {title[0]}", "", f"{title[1]}, torch {title[2]}, {title[3]}", ""]
        lines += [f"| {' | '.join(SHOWN)} |", "|---" * len(SHOWN) + "|"]
        lines += [f"| {' | '.join(row[column] for column in SHOWN)} |" for row in group]
    return lines


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: summary.py FOLDER")
    folder = Path(sys.argv[1])
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (folder / "summary.md").write_text("\n".join(["# Measured on a GPU", *tables(rows), ""]))
    print(folder / "summary.md")


if __name__ == "__main__":
    main()
