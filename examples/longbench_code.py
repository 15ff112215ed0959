"""Code completion in LongBench's format, of library modules that `builtin:tiny` was not trained on.

    python examples/longbench_code.py data/
    kvmix eval --model builtin:tiny --task longbench:lcc --data-dir data/ --preset kivi-2

A record is a module up to a line that stood in it before, far back, and asks for that line: the first such line after
6,000 characters. LongBench's own `lcc` asks for the next line of files from GitHub.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvmix_cli.texts import HELD_OUT_MODULES, module_sources

CONTEXT = 6000
"""Characters before the line that is asked for, at least: about 2,000 tokens of `builtin:tiny`."""
MOST = 7000
"""Characters before it, at most; a module without such a line in between is left out."""
BACK = 1500
"""Characters between the line and where it stood before, at least."""
SHORTEST = 20
"""Characters of a line that is asked for, at least."""


def record(text: str, name: str) -> dict[str, Any] | None:
    """Return a record of LongBench's schema; None for a text without a line to ask for."""
    start = 0
    for line in text.splitlines(keepends=True):
        seen = text.rfind(line, 0, start)
        if CONTEXT <= start <= MOST and len(line.strip()) >= SHORTEST and 0 <= seen <= start - BACK:
            return {
                "input": "",
                "context": text[:start],
                "answers": [line],
                "length": len(text[:start].split()),
                "dataset": "lcc",
                "language": "python",
                "all_classes": None,
                "_id": name,
            }
        start += len(line)
    return None


def main(folder: Path) -> None:
    """Write the file."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = {name: module_sources(name) for name in sorted(HELD_OUT_MODULES)}
    texts = [(f"{name}-{part}", text) for name, files in modules.items() for part, text in enumerate(files)]
    records = [each for name, text in texts if (each := record(text, name)) is not None]
    lines = "".join(json.dumps(each) + "\n" for each in records)
    (folder / "lcc.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(records)} records of {CONTEXT} to {MOST} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
