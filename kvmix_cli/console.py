"""The only file that prints. Results go to stdout; notices, progress and errors to stderr.

Modes, set once by the options that `commands/options.py` declares:

    quiet      no notices and no progress
    verbose    errors come with their traceback; so do they with `traceback`
    json       stdout holds one JSON object and nothing else: `table` and `text` print nothing, `emit_json` and `fail`
               do

A command therefore calls both `table` and `emit_json`; the mode decides which of them prints. Text of a file, a model
or a server never moves the cursor or changes the terminal: control characters are replaced by `?` on both streams.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .errors import KvmixError, OutputError

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

PIPE_WIDTH = 160
"""Columns of a table when stdout is not a terminal: wide enough that paths and plans are not cut."""
LEAST_WIDTH = 20
"""Columns of a table in any terminal, also in one that says that it has 1: cells of a narrower one would be lost."""
RATE_SECONDS = 24 * 60 * 60
"""Seconds that the rate of a bar is taken over; rich takes 30, and says nothing where one step takes longer."""
BETWEEN = 3
"""Columns of a terminal between two columns of a table."""
PACKAGE = "kvmix_"
"""Start of the names of our own packages' folders."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a terminal obeys (ESC, BEL, CR, the eight-bit CSI), but for tab and line end."""


@dataclass
class Mode:
    """The options of the command that is running.

    Attributes:
        answered: whether the one object of `--json` has been printed.
        begun: whether measuring has begun, so that there is something to resume.
        about: keys that every object of `--json` has: its schema, the version of kvmix, and the command's options.
    """

    quiet: bool = False
    verbose: bool = False
    traceback: bool = False
    json: bool = False
    answered: bool = False
    begun: bool = False
    about: dict[str, Any] = field(default_factory=dict)


mode = Mode()
_heard: list[tuple[TextIO, TextIO]] = []
"""The streams before each `muted` that goes on."""


class Bar:
    """A progress bar; call it for each step done."""

    def __init__(self, progress: Progress | None = None, description: str = "", total: float | None = None) -> None:
        self._progress = progress
        self._task = None if progress is None else progress.add_task(description, total=total)
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
    """Show a bar with the time left on stderr within this block; nothing if stderr is not a terminal."""
    mode.begun = True
    if mode.quiet or not sys.stderr.isatty():
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        """The time left, or the time so far while there is nothing to judge it by."""

        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            if task.time_remaining is not None and task.completed:
                return Text(f"{_duration(task.time_remaining)} left")
            return Text(f"{_duration(task.elapsed or 0)}{' so far' if task.completed else ', none done yet'}")

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeLeft())
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, speed_estimate_period=RATE_SECONDS) as bars:
        yield Bar(bars, one_line(description), total)


def notice(message: str) -> None:
    """Write a line that is not a result to stderr, unless the user asked for quiet."""
    if not mode.quiet:
        alert(message)


def alert(message: str) -> None:
    """Write a line that even a quiet user must see, such as a warning, to stderr."""
    _write(sys.stderr, f"kvmix: {one_line(message)}\n")


def text(chunk: str) -> None:
    """Write a piece of text to stdout, such as what a model generates as it forms."""
    if not mode.json:
        _write(sys.stdout, harmless(chunk))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], footer: str = "") -> None:
    """Show a table, with numbers to the right; `footer` is printed below it as it is.

    A table that is wider than the terminal is turned if that fits, or else broken between columns. A cell is wrapped
    only if it does not fit beside the row's name, and a name only if it has more than half of the line.
    """
    if mode.json:
        return
    from rich.console import Console
    from rich.text import Text

    grid = [[harmless(str(cell)) for cell in line] for line in (columns, *rows)]
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=sys.stdout.isatty(), width=width())
    console.print(Text(harmless(title), style="bold"), soft_wrap=True)
    for piece in _pieces(grid, width()):
        console.print(Text(), _grid(piece, width()), sep="\n")
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    _write(sys.stdout, "\n".join([*lines, "", *([harmless(footer)] if footer else [])]) + "\n")


def _pieces(grid: list[list[str]], limit: int) -> list[list[list[str]]]:
    """Return a grid of cells whole, turned, or in pieces that each begin with its first column."""
    columns = [list(column) for column in zip(*grid, strict=True)]
    if _grid_width(columns) <= limit:
        return [grid]
    if _grid_width(grid) <= limit:
        return [columns]
    pieces = [columns[:2]]
    for column in columns[2:]:
        if _grid_width([*pieces[-1], column]) <= limit:
            pieces[-1].append(column)
        else:
            pieces.append([columns[0], column])
    return [[list(row) for row in zip(*piece, strict=True)] for piece in pieces]


def _grid_width(columns: Sequence[Sequence[str]]) -> int:
    from rich.cells import cell_len

    return sum(max(map(cell_len, column)) for column in columns) + BETWEEN * (len(columns) - 1)


def _grid(grid: list[list[str]], limit: int) -> Table:
    """Return a table for rich. Only a column that is too wide for the line beside the first one is wrapped."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    style = box.SIMPLE_HEAD if is_unicode() else box.ASCII_DOUBLE_HEAD
    shown = Table(box=style, pad_edge=False, show_edge=False)
    columns = [list(column) for column in zip(*grid, strict=True)]
    is_too_wide = _grid_width(columns) > limit
    for position, (name, *cells) in enumerate(columns):
        shown.add_column(
            Text(name),
            justify="right" if all(map(_is_number, cells)) else "left",
            overflow="fold",
            no_wrap=not is_too_wide,
            max_width=limit // 2 if is_too_wide and position == 0 else None,
        )
    for row in grid[1:]:
        shown.add_row(*map(Text, row))
    return shown


def width() -> int:
    """Return the columns that a table may take."""
    from rich.console import Console

    return max(LEAST_WIDTH, Console().width) if sys.stdout.isatty() else PIPE_WIDTH


def emit_json(result: Mapping[str, Any]) -> None:
    """Print the one JSON object of `--json`, with `mode.about`; without `--json`, nothing. Paths become strings.

    Raises:
        KvmixError: if it holds NaN or Inf, which JSON cannot express.
    """
    if not mode.json:
        return
    try:
        encoded = json.dumps({**result, **mode.about}, allow_nan=False, ensure_ascii=False, default=_plain)
    except ValueError as error:
        raise KvmixError("the result holds a number that is NaN or infinite; JSON cannot hold it") from error
    mode.answered = True
    escaped = _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", encoded)
    _write(sys.stdout, escaped.encode("utf-8", "replace").decode() + "\n")


def fail(error: BaseException, command: str | None = None) -> None:
    """Report an error in one line on stderr, and with `--json` as the one object on stdout."""
    _report(error, command, str(error))


def fail_bug(error: BaseException, command: str | None) -> None:
    """Report an exception that kvmix should not have let happen, with what a bug report needs."""
    said = one_line(str(error))
    _report(
        error,
        command,
        f"this is a bug in kvmix: {type(error).__name__}{f': {said}' if said else ''} ({_place(error)}); please report "
        "it with this line, the output of the same command with --traceback, and `kvmix --version`",
    )


def stop(message: str, command: str | None) -> None:
    """Report that the user has interrupted the command, to whoever is still there: a terminal may have been closed."""
    with contextlib.suppress(OutputError, BrokenPipeError):
        alert(message)
    emit_error("Interrupted", message, command)


def emit_error(kind: str, message: str, command: str | None) -> None:
    """Print an error as the one object of `--json`, unless a result has been printed; without `--json`, nothing."""
    if mode.answered:
        return
    with contextlib.suppress(OutputError):  # stderr has the line
        emit_json({"command": command, "error": {"type": kind, "message": one_line(message)}})


def _report(error: BaseException, command: str | None, message: str) -> None:
    if mode.verbose or mode.traceback:
        _write(sys.stderr, harmless("".join(traceback.format_exception(error))))
    _write(sys.stderr, f"kvmix: error: {one_line(message)}\n")
    emit_error(type(error).__name__, message, command)


def _place(error: BaseException) -> str:
    """Return the file and line where an error arose, the innermost of our own if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if any(part.startswith(PACKAGE) for part in Path(frame.filename).parts)]
    last = (own or frames)[-1]
    parts = Path(last.filename).parts
    start = next((index for index, part in enumerate(parts) if part.startswith(PACKAGE)), len(parts) - 1)
    return f"{'/'.join(parts[start:])}:{last.lineno}"


def one_line(message: str) -> str:
    """Return a message without line breaks and control characters (it may quote a file or a server)."""
    words = " ".join(message.split())
    return "".join(character if character.isprintable() else "?" for character in words)


def harmless(text: str) -> str:
    """Return text with `?` for every character that a terminal obeys; line ends and tabs stay."""
    return _CONTROL.sub("?", text.replace("\r\n", "\n"))


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Within this block print nothing, since another process does."""
    _heard.append((sys.stdout, sys.stderr))
    try:
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield
    finally:
        _heard.pop()


@contextlib.contextmanager
def unmuted() -> Iterator[None]:
    """Within this block print, also inside of `muted`."""
    stdout, stderr = _heard[0] if _heard else (sys.stdout, sys.stderr)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        yield


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


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
    """Return scalars of numpy and torch as numbers, and everything else (paths) as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _write(stream: TextIO, message: str) -> None:
    """Write and flush, so that a full disk or a closed pipe is seen here and not at exit."""
    try:
        stream.write(message)
        stream.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        if stream is sys.__stdout__:  # or Python would write again at exit, and end with an error of its own
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
        raise OutputError(f"cannot write the output: {error.strerror}") from error
