"""The only file that prints. Results go to stdout; notices, progress and errors to stderr.

Three modes, set once by the options that `commands/options.py` declares:

    quiet      no notices and no progress
    verbose    errors come with their traceback
    json       stdout holds one JSON object and nothing else: tables and text are silent, and `emit_json` speaks

A command therefore calls both `table` and `emit_json`; the mode decides which of them is seen.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from .errors import KvmixError, OutputError

if TYPE_CHECKING:
    from rich.progress import Progress

PIPE_WIDTH = 160
"""Columns of a table when stdout is no terminal: wide enough that paths and plans are not cut."""


@dataclass
class Mode:
    """What the user asked to see."""

    quiet: bool = False
    verbose: bool = False
    json: bool = False


mode = Mode()


class Bar:
    """A progress bar; call it for each step done."""

    def __init__(self, progress: Progress | None = None, total: float | None = None) -> None:
        self._progress = progress
        self._task = None if progress is None else progress.add_task("", total=total)
        self.done = 0

    def __call__(self, steps: int = 1) -> None:
        """Go on by a number of steps."""
        self.reach(self.done + steps)

    def reach(self, done: int, total: int | None = None) -> None:
        """Go to an absolute number of steps, and possibly correct their total."""
        self.done = done
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total)


@contextlib.contextmanager
def progress(description: str, total: int | None) -> Iterator[Bar]:
    """A bar with the time left on stderr; nothing is shown if stderr is no terminal."""
    if mode.quiet or not sys.stderr.isatty():
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(description, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield Bar(bars, total)


def notice(message: str) -> None:
    """Tell something that is no result."""
    if not mode.quiet:
        alert(message)


def alert(message: str) -> None:
    """Tell something that must be seen even by a quiet user, such as a warning."""
    _write(sys.stderr, f"kvmix: {one_line(message)}\n")


def text(chunk: str) -> None:
    """Stream a piece of generated text, as it is."""
    if not mode.json:
        _write(sys.stdout, chunk)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], footer: str = "") -> None:
    """Show a table; numbers are set to the right. `footer` is printed below it as it is."""
    if mode.json:
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    style = box.SIMPLE_HEAD if is_unicode() else box.ASCII_DOUBLE_HEAD
    grid = Table(box=style, pad_edge=False, show_edge=False)
    for position, name in enumerate(columns):
        numeric = all(_is_number(row[position]) for row in rows)
        grid.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=sys.stdout.isatty(), width=width())
    console.print(Text(title, style="bold"), Text(), grid, sep="\n", soft_wrap=False)
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    _write(sys.stdout, "\n".join([*lines, "", *([footer] if footer else [])]) + "\n")


def width() -> int:
    """Columns that a table may take."""
    from rich.console import Console

    return Console().width if sys.stdout.isatty() else PIPE_WIDTH


def emit_json(result: Any) -> None:
    """Print the one JSON object of `--json`; without `--json`, nothing. Paths become strings.

    Raises:
        KvmixError: if it holds NaN or Inf, which JSON has no way to write.
    """
    if not mode.json:
        return
    try:
        encoded = json.dumps(result, allow_nan=False, ensure_ascii=False, default=_plain)
    except ValueError as error:
        raise KvmixError("the result holds a number that is NaN or infinite; JSON cannot hold it") from error
    _write(sys.stdout, encoded + "\n")


def fail(error: BaseException) -> None:
    """Report an error in one line, after its traceback if verbose."""
    if mode.verbose:
        _write(sys.stderr, "".join(traceback.format_exception(error)))
    _write(sys.stderr, f"kvmix: error: {one_line(str(error))}\n")


def one_line(message: str) -> str:
    """A message without line breaks or control characters (it may quote a file or a server)."""
    words = " ".join(message.split())
    return "".join(character if character.isprintable() else "?" for character in words)


def is_unicode() -> bool:
    """Return whether stdout can show block characters."""
    return (sys.stdout.encoding or "").lower().startswith("utf")


def _is_number(cell: Any) -> bool:
    try:
        float(str(cell).rstrip("%x"))
    except ValueError:
        return str(cell) in ("", "-")
    return True


def _plain(value: Any) -> Any:
    """Scalars of numpy and torch as numbers, everything else (paths) as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _write(stream: TextIO, message: str) -> None:
    """Write and flush, so that a full disk or a closed pipe is seen here and not at exit."""
    try:
        stream.write(message)
        stream.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise OutputError(f"cannot write the output: {error.strerror}") from error
