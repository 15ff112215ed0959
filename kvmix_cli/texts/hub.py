"""Data sets: on the hub, in a folder with the hub's layout, as `datasets.save_to_disk` left them, or one file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TextError
from ..quiet import hushed
from .records import document

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "hub:"
HELD_OUT_SPLITS = ("test", "validation", "train")
"""Splits for evaluation, the first that there is; anything else takes `train`."""
ARROW = b"ARROW1"
"""First bytes of an Arrow file with random access."""
_SAVED = ("state.json", "dataset_dict.json")
"""Files that `save_to_disk` puts beside its data."""


def hub_texts(spec: str, held_out: bool, seed: int, most: int) -> list[str]:
    """Return the documents of `NAME[:CONFIG[:SPLIT]]`, of many `most`, chosen by seed. Raises TextError."""
    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    if not name:
        raise TextError("'hub:' names no data set: use hub:NAME[:CONFIG[:SPLIT]]")
    if is_saved(Path(name)):
        return saved_texts(Path(name), split or None, held_out)
    where = f"{HUB}{spec}"
    if split or not held_out:
        rows = load_rows(name, config or None, split or "train")
    else:
        rows = _held_out(load_rows(name, config or None, None), where)
    return row_texts(some(rows, most, seed), where)


def load_rows(name: str, config: str | None, split: str | None, files: dict[str, str] | None = None) -> Any:
    """Return the rows of one split; all splits by name if none is asked for. Raises TextError."""
    import datasets

    from ..network import HUB_ERRORS

    options = {} if files is None else {"data_files": files}
    try:
        with hushed():
            return datasets.load_dataset(name, config, split=split, **options)
    except (*HUB_ERRORS, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        asked = f"configuration {config or 'default'}" + (f", split {split}" if split else "")
        raise TextError(
            f"cannot load data set {name} ({asked}): {reason}; check the name and the network, or give a file"
        ) from error


def is_saved(path: Path) -> bool:
    """Return whether a path is a folder of `datasets.save_to_disk`."""
    return any((path / name).is_file() for name in _SAVED)


def saved_texts(path: Path, split: str | None, held_out: bool) -> list[str]:
    """Return the documents of such a folder. Raises TextError, also for a split that it lacks."""
    import datasets

    try:
        rows = datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TextError(f"cannot read the data set in {path}: {error}; save it again") from error
    if isinstance(rows, datasets.DatasetDict):
        rows = _split(rows, split, str(path)) if split else _one_of(rows, held_out, str(path))
    elif split:
        raise TextError(f"{path} has no splits: leave out '{split}'")
    return row_texts(rows, str(path))


def rows_of(path: Path) -> Iterable[Any]:
    """Yield the records of a Parquet or Arrow file. Raises TextError."""
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        if path.suffix.lower() == ".parquet":
            yield from (row for batch in pyarrow.parquet.ParquetFile(path).iter_batches() for row in batch.to_pylist())
        else:
            yield from _arrow_rows(path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).strip().split("\n")[0]
        raise TextError(f"cannot read {path} as {path.suffix.lstrip('.')}: {reason}") from error


def _arrow_rows(path: Path) -> Iterator[Any]:
    """Yield the records of an Arrow file in either of its formats: with random access, or a stream as of `datasets`."""
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as file:
        if file.read(len(ARROW)) == ARROW:
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = pyarrow.ipc.open_stream(file)
        yield from (row for batch in batches for row in batch.to_pylist())


def some(rows: Dataset, most: int, seed: int) -> Dataset:
    """Return all rows in their order, or `most` of them chosen by seed."""
    return rows if len(rows) <= most else rows.shuffle(seed=seed).select(range(most))


def row_texts(rows: Iterable[Any], where: str) -> list[str]:
    """Return the document of each row. Raises TextError if one has none."""
    return [document(row, f"{where}, row {i}") for i, row in enumerate(rows)]


def _one_of(splits: Any, held_out: bool, where: str) -> Any:
    """Return the split to take when none is named."""
    return _held_out(splits, where) if held_out else _split(splits, "train", where)


def _held_out(splits: Any, where: str) -> Any:
    known = [name for name in HELD_OUT_SPLITS if name in splits]
    return _split(splits, known[0] if known else HELD_OUT_SPLITS[0], where)


def _split(splits: Any, name: str, where: str) -> Any:
    if name not in splits:
        raise TextError(f"{where} has no split '{name}': there are {', '.join(splits)}")
    return splits[name]
