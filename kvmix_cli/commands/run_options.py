"""Options of `kvmix run`: the prompt, the cache, and how one gets into the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..decoding.sampling import Sampling
from ..errors import KvmixError
from ..files import check_writable
from .options import ENCODE_ALONE, Encoding, refuse
from .values import count_option, output_option, parse_number, parse_width


@dataclass(frozen=True)
class PromptOptions:
    """The prompt, and how it is continued."""

    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to continue.")] = None
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Read the prompt from a file, or from stdin with '-'.")
    ] = None
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="FILE", help="An image before the prompt, in a chat template; repeatable."),
    ] = None
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False
    max_new_tokens: Annotated[int, count_option("Most tokens to generate.")] = 256
    temperature: Annotated[float, typer.Option(metavar="T", parser=parse_number, help="0 is greedy.")] = 0.0
    top_p: Annotated[
        float, typer.Option(metavar="P", parser=parse_number, help="Sample from this share of the probability.")
    ] = 1.0

    def __post_init__(self) -> None:
        """Raise typer.BadParameter unless there is one prompt, and KvmixError for a setting out of its range."""
        if (self.prompt is None) == (self.prompt_file is None):
            raise typer.BadParameter("give the prompt with --prompt or with --prompt-file, one of them")
        Sampling(self.temperature, self.top_p)  # which checks them


@dataclass(frozen=True)
class CacheOptions:
    """The cache, of which there is one."""

    plan: Annotated[
        str | None,
        typer.Option(metavar="PLAN", help="File, name or short form of a plan [default: the newest], or PLAN+PRESET."),
    ] = None
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A published method instead, such as mikv or kvtuner:FILE.")
    ] = None
    uniform: Annotated[
        int | None, typer.Option(metavar="BITS", parser=parse_width, help="The same width everywhere instead.")
    ] = None
    encode: Encoding = None
    baseline: Annotated[bool, typer.Option("--baseline", help="The unquantized cache instead.")] = False

    def __post_init__(self) -> None:
        """Raise typer.BadParameter for two caches at once."""
        if self.baseline and self.uniform is not None:
            raise typer.BadParameter("choose one of --baseline and --uniform")
        if self.encode and self.uniform is None:
            raise typer.BadParameter(ENCODE_ALONE)
        if self.preset and self.plan:
            raise typer.BadParameter("choose one of --plan and --preset, or put them together: --plan PLAN+PRESET")
        if self.preset and (self.baseline or self.uniform is not None):
            other = "--baseline" if self.baseline else "--uniform"
            raise typer.BadParameter(f"choose one of --preset and {other}")


@dataclass(frozen=True)
class FillingOptions:
    """The way of the prompt into the cache: fed at once or in chunks, or from a file that a run saved."""

    prefill_chunk: Annotated[
        int | None, count_option("Tokens of the prompt fed at a time, each packed before the next [default: all].")
    ] = None
    save_cache: Annotated[
        Path | None,
        output_option("Keep the packed cache of the prompt in a file."),
    ] = None
    load_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take the beginning of the prompt from such a file.")
    ] = None
    replace: Annotated[bool, typer.Option("--replace", help="Let --save-cache replace a file that is there.")] = False

    def __post_init__(self) -> None:
        """Raise KvmixError if a file would be replaced without consent, or cannot be written."""
        if self.save_cache is None:
            refuse({"replace": self.replace}, "is for --save-cache")
            return
        check_writable(self.save_cache)
        if self.save_cache.exists() and not self.replace:
            raise KvmixError(f"--save-cache {self.save_cache}: the file is there; add --replace, or name another file")

    @property
    def of_files(self) -> dict[str, Any]:
        """Return the options that name a file."""
        return {"save_cache": self.save_cache, "load_cache": self.load_cache}
