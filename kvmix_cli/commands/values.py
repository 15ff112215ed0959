"""Values of options that are written as text: sizes, counts, bits, lists of them, dtypes.

Parsers raise typer.BadParameter for what is no such value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from ..errors import ModelError, did_you_mean
from ..files import behind_links

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
MAX_COUNT = 2**31 - 1
SEEDS = range(-(2**63), 2**63)
"""Seeds that every generator of random numbers takes."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
"""Other names of dtypes."""
MODEL_DTYPES = ("auto", "float32", "bfloat16", "float16")


def _joined(text: str) -> str:
    """Return text without the underscores between digits, as Python writes long numbers."""
    return re.sub(r"(?<=\d)_(?=\d)", "", text)


def parse_bytes(text: str) -> int:
    """Return the bytes of a size: `8GiB`, `8G` (the same), `500MB` (decimal) or plain bytes.

    Pydantic's ByteSize is not used: it reads `8G` as a decimal size and ignores what follows a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)\s*", _joined(text), re.IGNORECASE | re.ASCII)
    if not match or (match[3].lower() == "i") or (match[3].lower() == "ib" and not match[2]):
        raise typer.BadParameter(f"'{text}' is not a size; write it like 8GiB, 500MB or 1000000")
    units = DECIMAL if match[3].lower() == "b" and match[2] else UNITS
    return int(float(match[1]) * units[match[2].lower()])


def parse_count(text: str | int) -> int:
    """Return a number of tokens, samples or sequences: `4096`, `4_096`, or `128K` for 128 x 1024."""
    match = re.fullmatch(r"\s*(-?\d{1,12}(?:\.\d{1,6})?)\s*([kmg]?)i?\s*", _joined(str(text)), re.IGNORECASE | re.ASCII)
    count = float(match[1]) * UNITS[match[2].lower()] if match else math.nan
    if not count.is_integer() or abs(count) > MAX_COUNT:
        raise typer.BadParameter(f"'{text}' is not a count; write it like 4096 or 128K")
    return int(count)


def count(least: int) -> Callable[[str | int], int]:
    """Return a parser of counts that are at least so many."""

    def parse(text: str | int) -> int:
        number = parse_count(text)
        if number < least:
            raise typer.BadParameter(f"{text} is less than {least}")
        return number

    return parse


def count_option(help: str, *, least: int | None = 1, **more: Any) -> Any:
    """Return an option that takes a count, in any of its spellings.

    Args:
        least: smallest number that is a correct use of the command line; None if something else judges it.
    """
    return typer.Option(metavar="N", parser=parse_count if least is None else count(least), help=help, **more)


def parse_counts(text: str) -> tuple[int, ...]:
    """Return counts, `1024,4096` or `1K,4K`, ascending."""
    try:
        return tuple(sorted({count(1)(part) for part in text.split(",")}))
    except typer.BadParameter as error:
        raise typer.BadParameter(f"'{text}' is not a list of counts; write it like 1024,4096 or 1K,4K") from error


def parse_longer(text: str) -> tuple[int, int]:
    """Return a number of samples and their tokens, `3x4096` or `3x4K`."""
    first, _, second = str(text).partition("x")
    try:
        return count(1)(first), count(2)(second)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"'{text}' is not samples of a length; write them like 3x4096 or 3x4K") from error


def parse_number(text: str | float) -> float:
    """Return a number, `2.3`; whoever uses it judges its range, NaN and Inf included."""
    try:
        return float(str(text).encode("ascii"))
    except ValueError as error:  # digits of other scripts as well
        raise typer.BadParameter(f"'{text}' is not a number; write it like 2.3") from error


def parse_width(text: str | int) -> int:
    """Return one width in bits, `4`; the plan judges which widths there are."""
    if not re.fullmatch(r"\s*[+-]?\d{1,9}\s*", str(text), re.ASCII):
        raise typer.BadParameter(f"'{text}' is not a number of bits; write a whole one like 4")
    return int(text)


def output_option(help: str, *, metavar: str = "FILE") -> Any:
    """Return an option that names a file to write, which is the one behind it where a link is named."""
    return typer.Option(metavar=metavar, parser=lambda text: behind_links(Path(text)), help=help)


def parse_seed(text: str | int) -> int:
    """Return a seed of random numbers, a whole number of 64 bits."""
    match = re.fullmatch(r"\s*[+-]?\d{1,20}\s*", _joined(str(text)), re.ASCII)
    if not match or (seed := int(match[0])) not in SEEDS:
        raise typer.BadParameter(f"'{text}' is not a seed; write a whole number from -2^63 to 2^63 - 1")
    return seed


def parse_bits(text: str) -> tuple[int, ...]:
    """Return the bit widths of a list, `2,3`, ascending."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,2}", part) for part in parts):
        raise typer.BadParameter(f"'{text}' is not a list of bit widths; write it like 2,3,4")
    return tuple(sorted({int(part) for part in parts}))


def parse_batch(text: str) -> int | str:
    """Return a batch size, or `auto`."""
    if text == "auto":
        return text
    try:
        return count(1)(text)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"'{text}' is not a batch size; write a number or auto") from error


def parse_names(text: str) -> tuple[str, ...]:
    """Return the names of a list, `rank,ilp`."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def parse_budgets(text: str) -> tuple[float, ...]:
    """Return budgets in bits, `2.5,3`, ascending."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,2}(?:\.\d*)?|\.\d+", part, re.ASCII) for part in parts):
        raise typer.BadParameter(f"'{text}' is not a list of bits; write it like 2.5,3,3.5")
    return tuple(sorted({float(part) for part in parts}))


def parse_groups(text: str) -> tuple[int | str, ...]:
    """Return group sizes, `32,64` or `row`; the cache's settings decide which are possible."""
    return tuple(_count_or_text(part.strip()) for part in text.split(","))


def parse_window(text: str) -> str:
    """Return a window with its count as a plain number, `recent:4096` for `recent:4K`; the plan judges the rest."""
    kind, colon, tokens = text.partition(":")
    return f"{kind}:{_count_or_text(tokens)}" if colon else text


def _count_or_text(text: str) -> int | str:
    try:
        return count(0)(text)
    except typer.BadParameter:
        return text


def parse_encode(text: str) -> str:
    """Return the name of an encoder. Raises typer.BadParameter for another text."""
    from ..plan.settings import ENCODES

    if text not in ENCODES:
        known = ", ".join(ENCODES)
        raise typer.BadParameter(f"'{text}' is no encoder{did_you_mean(text, ENCODES)}; use {known}")
    return text


def parse_percent(text: str) -> float:
    """Return `0.5%` as 0.005. A number without the sign could mean either, so it is refused."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*", text, re.ASCII)
    if not match:
        raise typer.BadParameter(f"'{text}' is not a percentage; write it like 0.5%")
    return float(match[1]) / 100


def parse_dtype(text: str) -> str:
    """Return a dtype by the name that torch gives it: `bf16` is `bfloat16`."""
    return DTYPES.get(text.strip().lower(), text)


def parse_model_dtype(text: str) -> str:
    """Return the name of a dtype that a model can be loaded in. Raises ModelError."""
    dtype = parse_dtype(text)
    if dtype not in MODEL_DTYPES:
        known = ", ".join(MODEL_DTYPES)
        raise ModelError(f"unknown dtype '{text}'{did_you_mean(text, (*MODEL_DTYPES, *DTYPES))}: use {known}")
    return dtype
