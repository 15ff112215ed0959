"""Options that commands share, as types: `def run(model: options.Model = None, seed: options.Seed = 0, ...)`.

`--json`, `-v`, `-q` and `--profiles-dir` take effect when they are parsed; a command only has to declare them.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Annotated

import typer

from .. import console, state

COMMAND_LINE = "kvmix.command_line"
"""Key of `ctx.meta`: the command line as it was given, e.g. `kvmix allocate --avg-bits 2.3`."""

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_bytes(text: str) -> int:
    """`8GiB`, `8G` (the same), `500MB` (decimal) or plain bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)\s*", text, re.IGNORECASE)
    if not match or (match[3].lower() == "i") or (match[3].lower() == "ib" and not match[2]):
        raise typer.BadParameter(f"'{text}' is no size; write it like 8GiB, 500MB or 1000000")
    units = DECIMAL if match[3].lower() == "b" and match[2] else UNITS
    return int(float(match[1]) * units[match[2].lower()])


def parse_bits(text: str) -> tuple[int, ...]:
    """A ladder of bit widths, `2,3`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,2}", part) for part in parts):
        raise typer.BadParameter(f"'{text}' is no list of bit widths; write it like 2,3,4")
    return tuple(int(part) for part in parts)


def parse_counts(text: str) -> tuple[int, ...]:
    """Counts, `1024,4096`, ascending."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9][0-9]{0,8}", part) for part in parts):
        raise typer.BadParameter(f"'{text}' is no list of counts; write it like 1024,4096")
    return tuple(sorted({int(part) for part in parts}))


def parse_batch(text: str) -> int | str:
    """A batch size, or `auto`."""
    if text == "auto":
        return text
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise typer.BadParameter(f"'{text}' is no batch size; write a number or auto")
    return int(text)


def parse_names(text: str) -> tuple[str, ...]:
    """Names, `rank,ilp`."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def parse_budgets(text: str) -> tuple[float, ...]:
    """Budgets in bits, `2.5,3`, ascending."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,2}(?:\.\d*)?|\.\d+", part, re.ASCII) for part in parts):
        raise typer.BadParameter(f"'{text}' is no list of bits; write it like 2.5,3,3.5")
    return tuple(sorted({float(part) for part in parts}))


def parse_groups(text: str) -> tuple[int | str, ...]:
    """Group sizes, `32,64` or `row`; the cache's settings decide which there can be."""
    parts = [part.strip() for part in text.split(",")]
    return tuple(int(part) if re.fullmatch(r"[0-9]{1,6}", part) else part for part in parts)


def parse_percent(text: str) -> float:
    """`0.5%` as 0.005. Without the sign it could be either, so that is refused."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*", text, re.ASCII)
    if not match:
        raise typer.BadParameter(f"'{text}' is no percentage; write it like 0.5%")
    return float(match[1]) / 100


def _set_mode(name: str, value: bool) -> bool:
    setattr(console.mode, name, value)
    return value


def _set_verbose(value: bool) -> bool:
    logging.getLogger("kvmix").setLevel(logging.INFO if value else logging.NOTSET)
    return _set_mode("verbose", value)


def _use_dir(folder: Path | None) -> Path | None:
    state.use_dir(folder)
    return folder


Model = Annotated[
    str | None,
    typer.Option(metavar="ID", help="Hub id, local folder or builtin:tiny; needed if several have files."),
]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of the model on the hub.")]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, or map (spread over GPUs).")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of everything that is drawn at random.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
ProfilesDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        callback=_use_dir,
        help="Where profiles and plans are kept [default: ./profiles, or $KVMIX_PROFILES_DIR].",
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", callback=lambda value: _set_mode("json", value), help="Print one JSON object and nothing else."
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", callback=_set_verbose, help="Show what the libraries say, and tracebacks of errors."
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=lambda value: _set_mode("quiet", value), help="No notices, no progress bars."
    ),
]
