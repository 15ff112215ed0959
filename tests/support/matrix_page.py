"""The page about models, docs/models.md, from what the matrix has found; and the file that keeps it.

python tests/support/matrix_page.py RESULTS.jsonl     store results of `matrix_pool.py`, and write the page
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from matrix import CHECKS, FAULT, KINDS, NOT_BUILT, PART, REFUSED, YES, Outcome
from matrix_pool import read_outcomes

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "models" / "matrix.json"
PAGE = ROOT / "docs" / "models.md"
_HEAD = """# Models, architecture by architecture

Look up here whether kvmix works with your model's type (`model_type` in its config.json), and if it does not, why.

Every architecture that transformers {version} lists as a causal language model, or as one that reads images or sound
and writes text, is built here from its configuration, small (a layer of each kind, at least two, heads of 32 channels,
some thousand tokens) and with random weights, saved as its checkpoints are, and loaded by kvmix's own loader. Six
checks follow:

1. **equal**: 16 bits decode what transformers' own cache decodes, greedily, in a left-padded batch of two: the same
   tokens, and logits within a thousandth (float32)
2. **close**: logits at 4 bits are within a half of those at 16 (two that have nothing to do with each other differ by
   1.4), and packed tokens were read
3. **profile**, 4. **allocate**, 5. **run**, 6. **eval**: the four commands, one after the other

{total} architectures; `make matrix` does it again.

| outcome | architectures | |
|---|--:|---|
"""
_ENCODERS = """
BERT and its kin are built as decoders (`is_decoder: true`); as encoders they are refused. Mistral is built without its
sliding window, as its checkpoints are since version 0.2. What is refused is refused by every command in the line given
here, before anything is measured.
"""
_TABLE = """
## All

*Layers* are those that a plan decides about; the others keep the cache of their kind and are listed by `run` and
`eval`. *Heads* are KV heads by channels; of latent attention the latent is the key and its rotary part the value. A
class that keeps an *attention* of its own reads the same cache, only slower.

| model type | class | outcome | layers | heads | attention |
|---|---|---|---|---|---|
"""


def page(outcomes: Iterable[Outcome], version: str) -> str:
    """Return the page, in Markdown."""
    rows = sorted(outcomes, key=lambda outcome: outcome.type)
    counts = Counter(outcome.kind for outcome in rows)
    parts = [_HEAD.format(version=version, total=len(rows))]
    parts += [f"| {kind} | {counts[kind]} | {meaning} |\n" for kind, meaning in KINDS.items()]
    parts.append(_ENCODERS)
    for kind, title in ((PART, "In part"), (REFUSED, "Refused"), (NOT_BUILT, "Not built")):
        if some := [outcome for outcome in rows if outcome.kind == kind]:
            parts += [f"\n## {title}\n\n| model type | reason |\n|---|---|\n"]
            parts += [f"| {_named(outcome)} | {_cell(outcome.reason)} |\n" for outcome in some]
    parts.append(_TABLE)
    for each in rows:
        cells = (each.type, each.name, each.kind, each.layers, each.heads, _attention(each))
        parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)


def _named(outcome: Outcome) -> str:
    """Return the model type; of one that works in part with the checks that pass."""
    passed = [name for name in CHECKS if outcome.checks[name] == YES]
    return f"{outcome.type} ({', '.join(passed)} pass)" if passed else outcome.type


def _attention(outcome: Outcome) -> str:
    if not outcome.layers:
        return ""
    return "its own" if "keeps '" in outcome.note else "kvmix"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def read_stored() -> tuple[dict[str, Outcome], str]:
    """Return the stored outcomes by model type, and the version of transformers that they are of."""
    data = json.loads(STORED.read_text(encoding="utf-8"))
    return {row["type"]: Outcome(**row) for row in data["outcomes"]}, data["transformers"]


def store(outcomes: Iterable[Outcome]) -> None:
    """Write the file of outcomes, one a line and without what its class implies or what differs from run to run.

    The page is written as well.
    """
    rows = [_row(outcome) for outcome in sorted(outcomes, key=lambda outcome: outcome.type)]
    lines = ",\n".join(map(json.dumps, rows))
    version = transformers.__version__
    STORED.write_text(f'{{"transformers": "{version}", "outcomes": [\n{lines}\n]}}\n', encoding="utf-8")
    PAGE.write_text(page(outcomes, version), encoding="utf-8")


def _row(outcome: Outcome) -> dict[str, Any]:
    implied = {"seconds"} if outcome.kind in (PART, FAULT) else {"seconds", "checks"}
    return {name: value for name, value in asdict(outcome).items() if value and name not in implied}


def main(arguments: Sequence[str]) -> None:
    """Store what a file has, and write the page."""
    store(list(read_outcomes(Path(arguments[0])).values()))


if __name__ == "__main__":
    main(sys.argv[1:])
