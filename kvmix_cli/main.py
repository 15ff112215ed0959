"""The command line: registers the commands, and turns what ends them into one line and an exit code.

    0 done    1 a KvmixError    2 wrong usage    3 a --fail-if gate failed    130 interrupted

Nothing here imports torch, transformers or pydantic; the commands do, inside their functions.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import console
from ._version import __version__
from .commands import allocate, demo, eval, export, inspect, options, profile, report, run
from .commands.grouped import GroupedCommand
from .errors import KvmixError

RESUMABLE = ("profile", "eval")
INTERRUPTED = 130


class Commands(TyperGroup):
    """All commands, and what holds for every one of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the command line: files that a command writes begin with it."""
        ctx.meta[options.COMMAND_LINE] = shlex.join(["kvmix", *args])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; a KvmixError ends it with code 1, Ctrl-C with code 130."""
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except KvmixError as error:
                console.fail(error)
                raise typer.Exit(1) from error
            except KeyboardInterrupt:
                console.alert(_interrupted(ctx))
                raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("profile", short_help="Measure how important each layer's keys and values are.")(profile.profile)
app.command("allocate", short_help="Decide every layer's bits under a budget.")(allocate.allocate)
app.command("run", short_help="Generate with the quantized cache.")(run.run)
app.command("eval", cls=GroupedCommand, short_help="Measure plans against the unquantized cache.")(eval.evaluate)
app.command("report", short_help="Runs in one table, and a page with plots.")(report.report)
app.command("inspect", short_help="Show, validate or compare profiles and plans.")(inspect.inspect)
app.command("export", short_help="Write a plan for vLLM, ModelOpt, llama.cpp or KVTuner.")(export.export)
app.command("demo", short_help="All of it on the built-in model, in a few minutes.")(demo.demo)


def main() -> None:
    """Entry point of `kvmix`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app(prog_name="kvmix")


def _version(wanted: bool) -> None:
    if wanted:
        console.text(f"kvmix {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Decide how many bits each layer's KV cache deserves, then run and honestly evaluate the model with it.

    In this order: profile MODEL, allocate, run, eval. State between them is files under ./profiles.
    """


def _interrupted(ctx: Any) -> str:
    if ctx.invoked_subcommand not in RESUMABLE:
        return "interrupted"
    line = ctx.meta[options.COMMAND_LINE]
    return f"interrupted; go on with `{line if '--resume' in line else line + ' --resume'}`"


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """One line for a warning; those meant for programmers only if verbose."""
    if console.mode.verbose or not issubclass(category, (DeprecationWarning, FutureWarning)):
        console.alert(f"warning: {message}")
