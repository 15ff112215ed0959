"""Texts that evaluations of language models agree on, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .files import path_texts
from .hub import load_rows, row_texts, some

MOST = 50_000
"""Rows taken of a text by name, chosen by seed; more than a shard of C4's validation split has."""


@dataclass(frozen=True)
class DataSplit:
    """A split of a data set; `file` where it is only one of the data set's files."""

    split: str
    file: str | None = None


@dataclass(frozen=True)
class NamedText:
    """A text on the hub, or the same rows at a path.

    Attributes:
        joined: the rows are lines of one long document, with a blank line between them, as in GPTQ's evaluation and
            everybody's since; otherwise each is a document.
        path: where the rows are if they are not to come from the hub; both sides are then the same.
    """

    name: str
    repository: str
    config: str | None
    training: DataSplit
    held_out: DataSplit
    joined: bool = False
    path: str = ""

    def load(self, held_out: bool, seed: int) -> list[str]:
        """Return its documents. Raises TextError."""
        texts = path_texts(Path(self.path).expanduser(), held_out) if self.path else self._from_hub(held_out, seed)
        return ["\n\n".join(texts)] if self.joined else texts

    def describe(self, held_out: bool) -> str:
        """Return the data set, or path, that the name stands for."""
        side = self.held_out if held_out else self.training
        place = self.path or " ".join(part for part in (self.repository, self.config, f"{side.split} split") if part)
        first = ", first shard" if side.file and not self.path else ""
        return f"{self.name} ({place}{first}{', rows joined' if self.joined else ''})"

    def _from_hub(self, held_out: bool, seed: int) -> list[str]:
        side = self.held_out if held_out else self.training
        files = None if side.file is None else {side.split: side.file}
        rows = load_rows(self.repository, self.config, side.split, files)
        return row_texts(rows if self.joined else some(rows, MOST, seed), self.name)


_WIKITEXT2 = NamedText(
    "wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", DataSplit("train"), DataSplit("test"), joined=True
)
_C4 = NamedText(
    "c4",
    "allenai/c4",
    None,
    DataSplit("train", "en/c4-train.00000-of-01024.json.gz"),
    DataSplit("validation", "en/c4-validation.00000-of-00008.json.gz"),
)
NAMED = {text.name: text for text in (_WIKITEXT2, _C4)}


def find_named(source: str) -> NamedText | None:
    """Return the text that `NAME` or `NAME:PATH` stands for; None if it is no such name."""
    name, _, path = source.partition(":")
    return replace(NAMED[name], path=path) if name in NAMED else None
