"""Options of `kvmix allocate`, and the name that they give a plan."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .dry_run import DryRunFlag
from .options import Encoding, Model, given
from .values import (
    count_option,
    output_option,
    parse_bits,
    parse_budgets,
    parse_bytes,
    parse_dtype,
    parse_groups,
    parse_number,
    parse_percent,
    parse_width,
    parse_window,
)

if TYPE_CHECKING:
    from ..plan import CacheSettings
    from ..profile import Profile

FAMILY, SEARCH, PAPER, TRANSFORM = "pareto", "search", "rank", "transform"
"""The methods that write several plans, that measure plans, of the paper, and that code directions."""


def parse_by_head(text: str) -> tuple[str, float]:
    """Return what KV heads have of their own, with its number. Raises typer.BadParameter for another text."""
    what, colon, number = text.partition(":")
    if what in ("widths", "budgets") and not colon:
        return what, 0.2
    if what in ("budgets", "whole") and re.fullmatch(r"0|1|0?\.\d+|1\.0*|0\.", number):
        return what, float(number)
    raise typer.BadParameter(f"'{text}': use widths, budgets, budgets:SURE or whole:SHARE, numbers from 0 to 1")


def _file_name(name: str | None) -> str | None:
    """Raise typer.BadParameter for a name that is not a plain file name."""
    if name is not None and not re.fullmatch(r"[\w][\w.+-]*", name):
        raise typer.BadParameter(f"'{name}' cannot be the name of a plan; use --out to write to another folder")
    return name


@dataclass(frozen=True)
class BudgetOptions:
    """The budget, of which there is exactly one, and the method that spends it."""

    avg_bits: Annotated[
        float | None,
        typer.Option(
            metavar="BITS", parser=parse_number, help="Budget: mean nominal bits of keys and values, e.g. 2.3."
        ),
    ] = None
    stored_bits: Annotated[
        float | None,
        typer.Option(metavar="BITS", parser=parse_number, help="Budget: the same with scales and zeros, e.g. 3.0."),
    ] = None
    memory: Annotated[
        int | None,
        typer.Option(metavar="SIZE", parser=parse_bytes, help="Budget: bytes of the cache, e.g. 8GiB."),
    ] = None
    max_loss: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT", parser=parse_percent, help="Budget: predicted rise of the perplexity, e.g. 0.5%."
        ),
    ] = None
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="paper: 20 % of the layers at K 3 / V 4 bits, the rest at 2. transform-2: transform codes of 2 bits.",
        ),
    ] = None
    context: Annotated[
        int, count_option("Tokens that bytes are counted at, and that losses of transform codes are predicted for.")
    ] = 32768
    batch: Annotated[int, count_option("Sequences that bytes are counted at.")] = 1
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="transform (bits of directions), ilp (exact), rank (the paper), cut, uniform, random, search, pareto "
            "(no budget) [default: transform if the profile has directions, ilp if a score knows widths, else rank].",
        ),
    ] = None

    def __post_init__(self) -> None:
        """Raise typer.BadParameter unless there is exactly one budget, or none for the method that takes none."""
        budgets = len(given(self.limits)) + (self.preset is not None)
        if self.method == FAMILY and budgets:
            raise typer.BadParameter("pareto takes no budget: it makes plans along the whole range; for one use ilp")
        if self.method != FAMILY and budgets != 1:
            raise typer.BadParameter(
                "give exactly one budget: --avg-bits, --stored-bits, --memory, --max-loss or --preset"
            )

    @property
    def limits(self) -> dict[str, Any]:
        """Return the limits by the names that `Budget` has for them."""
        return {name: getattr(self, name) for name in ("avg_bits", "stored_bits", "memory", "max_loss")}


@dataclass(frozen=True)
class StorageOptions:
    """The widths to choose from, and the settings of the cache."""

    k_bits: Annotated[
        Any, typer.Option(metavar="LIST", parser=parse_bits, help="Widths for keys [default: 2,3,4,8].")
    ] = None
    v_bits: Annotated[
        Any,
        typer.Option(
            metavar="LIST",
            parser=parse_bits,
            help="Widths for values [default: 2,4,8; to ilp, pareto, search also 3].",
        ),
    ] = None
    min_bits: Annotated[int | None, typer.Option(metavar="BITS", parser=parse_width, help="Use no narrower width.")] = (
        None
    )
    max_bits: Annotated[int | None, typer.Option(metavar="BITS", parser=parse_width, help="Use no wider width.")] = None
    pin: Annotated[
        list[str] | None,
        typer.Option(metavar="PINS", help="Layers decided by hand, e.g. '0,-1:k8v8;2-4:k4v2'; repeatable."),
    ] = None
    group_size: Annotated[
        Any,
        typer.Option(
            metavar="LIST",
            parser=parse_groups,
            help="Elements that share a scale, or row for all; several for methods that choose [default: 64].",
        ),
    ] = None
    page: Annotated[int | None, count_option("Tokens quantized together [default: 128].")] = None
    sink: Annotated[int | None, count_option("First tokens kept exact [default: 4].", least=0)] = None
    window: Annotated[
        str | None,
        typer.Option(
            metavar="W",
            parser=parse_window,
            help="Last tokens kept exact: recent:N, rpc or none [default: recent:128].",
        ),
    ] = None
    scale_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE", parser=parse_dtype, help="Data type of scales: float16 or bfloat16 [default: float16]."
        ),
    ] = None
    encode: Encoding = None
    exact: Annotated[
        int | None,
        count_option("Tokens of a page that transform codes keep exact [default: what loses least].", least=0),
    ] = None
    evict: Annotated[
        Any,
        typer.Option(
            metavar="LIST",
            parser=parse_budgets,
            help="Shares of tokens to evict, such as 0,0.25,0.5: each layer gets one (ilp, by a score with them).",
        ),
    ] = None
    by_head: Annotated[
        Any,
        typer.Option(
            metavar="WHAT",
            parser=parse_by_head,
            help="KV heads differ, by a score with heads: widths, budgets[:SURE] of tokens kept, or whole:SHARE that "
            "keeps all tokens.",
        ),
    ] = None
    put_on: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="PRESET", help="Also its transforms, tiers and runs, e.g. mikv; repeatable."),
    ] = None

    def caches(self, base: CacheSettings) -> list[CacheSettings]:
        """Return cache settings with these options, one for each group size. Raises typer.BadParameter."""
        from ..plan import CacheSettings, windows
        from ..plan.document.strict_yaml import reason

        names = ("page", "sink", "scale_dtype", "window", "encode")
        settings = {
            **base.model_dump(),
            **{name: value for name in names if (value := getattr(self, name)) is not None},
        }
        if self.window is not None:
            settings["window"] = windows.parse_window(self.window)
        try:
            return [
                CacheSettings.model_validate({**settings, "group_size": size})
                for size in self.group_size or [base.group_size]
            ]
        except ValueError as error:
            raise typer.BadParameter(reason(error)) from error


@dataclass(frozen=True)
class SearchOptions:
    """The score, and the work that `--method search` does."""

    score: Annotated[
        str | None, typer.Option(metavar="NAME", help="Score to use [default: the best for the method].")
    ] = None
    trials: Annotated[int, count_option("Plans that search measures.")] = 40
    calibration: Annotated[str, typer.Option(metavar="TEXT", help="Text that search measures on.")] = "builtin"
    samples: Annotated[int, count_option("Documents that search measures on.")] = 4
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted search, or a shorter one.")] = (
        False
    )


@dataclass(frozen=True)
class PlanFileOptions:
    """The profile that is read, and the plan file that is written."""

    name: Annotated[
        str | None, typer.Option(metavar="NAME", callback=_file_name, help="Name of the plan [default: e.g. rank-2.3].")
    ] = None
    out: Annotated[
        Path | None,
        output_option("Where to write [default: plans/NAME.yaml beside the profile]."),
    ] = None
    profile: Annotated[Path | None, typer.Option(metavar="FILE", help="Profile to use [default: the newest].")] = None
    model: Model = None
    dry_run: DryRunFlag = False


def default_name(
    method: str,
    budget: BudgetOptions,
    storage: StorageOptions,
    effort: SearchOptions,
    seed: int,
    named: Profile | None,
) -> str:
    """Return a name that depends on the options alone: `rank-2.3`, `ilp-stored-3`, `rank-8GiB-32768x1`."""
    from ..allocation import METHODS, preset_start
    from ..plan.sizes import format_bytes

    if budget.preset is not None:
        parts = [budget.preset] if method == preset_start(budget.preset).method else [budget.preset, method]
    elif budget.memory is not None:
        parts = [method, format_bytes(budget.memory).replace(" ", ""), f"{budget.context}x{budget.batch}"]
    elif budget.max_loss is not None:
        parts = [method, f"max-loss-{100 * budget.max_loss:g}pct"]
    elif budget.stored_bits is not None:
        parts = [method, f"stored-{budget.stored_bits:g}"]
    else:
        parts = [method, f"{budget.avg_bits:g}"]
    if "seed" in METHODS[method].uses:
        parts.append(f"seed{seed}")
    if options := options_hash(method, storage, effort, named):
        parts.append(options)
    return "+".join(["-".join(parts), *(storage.put_on or [])])


def options_hash(method: str, storage: StorageOptions, effort: SearchOptions, named: Profile | None) -> str:
    """Return a short hash of the options that change a plan and are not in its name, or "" for none of them.

    With it no plan replaces another one. A profile that was named counts as well, by its content.
    """
    others = {**asdict(storage), "put_on": None, "score": effort.score, "profile": named and named.sha256}
    if method == SEARCH and (effort.calibration, effort.samples) != (SearchOptions.calibration, SearchOptions.samples):
        others |= {"calibration": effort.calibration, "samples": effort.samples}
    others = given(others)
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:6] if others else ""
