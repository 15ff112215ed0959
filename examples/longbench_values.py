"""Questions in LongBench's format that `builtin:tiny` can answer: values that were stated far back in a library module.

    python examples/longbench_values.py data/
    kvmix eval --model builtin:tiny --task longbench:trec --data-dir data/ --max-length 1024 --preset kivi-2

LongBench's own questions are beyond a model of 7 M parameters that was trained on Python. These have its schema, the
prompt and the metric of its `trec` (the right class among those of the record), and are code that the model was not
trained on, in which six names have values:

    stone_price = 4821           ... and a thousand tokens later, as the question:  assert stone_price ==

All six values are the classes. A context is longer than the 1,024 tokens of the command above, so that all prompts
are cut to one length and share a batch. What is cut, in the middle, lies behind the value asked for in all but one.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvmix_cli.texts import HELD_OUT_MODULES, module_sources

RECORDS = 32
CHARACTERS = 4500
"""Of a context, at least: some 1,300 tokens of `builtin:tiny`."""
STATED = 0.3
"""Share of the lines of a context, from its beginning, among which values are stated."""
PLACES = ("stone", "river", "cloud", "wind", "salt", "iron", "lake", "tree", "port", "snow")
KINDS = ("price", "width", "month", "score", "depth", "angle", "count", "limit", "speed", "radius")
"""First and second words of names."""
VALUES = 6


def contexts(rng: random.Random) -> Iterator[list[str]]:
    """Yield the lines of a piece of each of `RECORDS` held-out modules."""
    texts = [text for name in sorted(HELD_OUT_MODULES) for text in module_sources(name)]
    for text in rng.sample([each for each in texts if len(each) > 2 * CHARACTERS], RECORDS):
        _, *lines = text[rng.randrange(len(text) - 2 * CHARACTERS) :].splitlines(keepends=True)
        characters = 0
        for taken, line in enumerate(lines):
            if characters >= CHARACTERS:
                yield lines[:taken]
                break
            characters += len(line)


def record(number: int, lines: list[str], rng: random.Random) -> dict[str, Any]:
    """Return a record of LongBench's schema that asks for one of the values it states."""
    words = zip(rng.sample(PLACES, VALUES), rng.sample(KINDS, VALUES), strict=True)
    names = [f"{place}_{kind}" for place, kind in words]
    values = [f"{value:04}" for value in rng.sample(range(10_000), VALUES)]
    places = rng.sample(range(1, int(STATED * len(lines))), VALUES)
    stated = dict(zip(places, zip(names, values, strict=True), strict=True))
    context = ""
    for place, line in enumerate(lines):
        context += f"{' = '.join(stated[place])}\n{line}" if place in stated else line
    asked = rng.randrange(VALUES)
    return {
        "input": f"assert {names[asked]} ==",
        "context": context,
        "answers": [values[asked]],
        "length": len(context.split()),
        "dataset": "trec",
        "language": "en",
        "all_classes": values,
        "_id": f"values-{number}",
    }


def main(folder: Path) -> None:
    """Write the file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    records = [record(number, lines, rng) for number, lines in enumerate(contexts(rng))]
    lines = "".join(json.dumps(each) + "\n" for each in records)
    (folder / "trec.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(records)} records")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
