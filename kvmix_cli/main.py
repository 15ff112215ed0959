"""The command line: registers the commands, and turns whatever ends them into one line and an exit code.

    0 done    1 a KvmixError, or a bug    2 wrong usage    3 a --fail-if gate failed    130 interrupted

Nothing here imports torch, transformers or pydantic; the commands do, inside their functions and after their options
are checked.
"""

from __future__ import annotations

import errno
import io
import itertools
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from . import console
from ._version import __version__
from .commands import (
    allocate,
    demo,
    eval,
    export,
    fit,
    inspect,
    listing,
    options,
    profile,
    recommend,
    report,
    run,
)
from .commands.grouped import GroupedCommand
from .commands.ranks import meet
from .commands.settings_file import say_which_counts, with_settings
from .errors import FieldsLeftOut, KvmixError, first_sentence, is_out_of_memory
from .extensions import extension_error
from .garbage import put_off
from .ranks import current

RESUMABLE = ("profile", "eval", "demo")
SCHEMA = "kvmix-json/1"
"""Name of the keys of `--json`, which keep their meaning; new ones may be added."""
OF_PATHS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.EROFS, errno.EIO)
"""Errors of the system that are about a path that a user named, wherever it is that they come up."""
MAX_SHOWN = 200
"""Characters of a path that an error shows."""
INTERRUPTED = 130
FAILED = 1
NO_MEMORY = (
    "out of memory ({error}); use a smaller model, less text or a shorter context, or a machine with more memory"
)
_ClickException: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
"""Base of the errors that Typer shows by itself; where it is defined depends on Typer's version."""


class Commands(TyperGroup):
    """All commands, and what holds for every one of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the command line, which begins files that a command writes; with `--json` a wrong one is one object."""
        try:
            return self._parse(ctx, args)
        except KeyboardInterrupt:
            console.stop("interrupted", args[0] if args else None)
            raise typer.Exit(INTERRUPTED) from None
        except _ClickException as error:
            _emit_usage_error(error, args[0] if args else None)
            raise

    def _parse(self, ctx: Any, args: list[str]) -> list[str]:
        console.mode = console.Mode(json="--json" in args, about={"schema": SCHEMA, "kvmix": __version__})
        for number, argument in enumerate(args, start=1):
            if any("\ud800" <= character <= "\udfff" for character in argument):
                ctx.fail(f"argument {number} is not valid UTF-8: {os.fsencode(argument)!r}")
        if args and (command := self.get_command(ctx, args[0])) is not None:
            try:
                args = [args[0], *with_settings(command, ctx, args[1:])]
            except KvmixError as error:
                console.fail(error, args[0])
                raise typer.Exit(FAILED) from error
            console.mode.json = "--json" in args
            own = type(ctx)(command, info_name=args[0], parent=ctx)
            _refuse_empty(own, args)
            _say_repeated(own, args[1:])
        ctx.meta[options.COMMAND_LINE] = shlex.join(["kvmix", *args])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command, and report whatever ends it early: every error is one line and an exit code."""
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                meet(shlex.split(ctx.meta[options.COMMAND_LINE])[1:2])
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort, BrokenPipeError):
                raise
            except KvmixError as error:
                with _alone(FAILED):
                    console.fail(error, ctx.invoked_subcommand)
                raise typer.Exit(FAILED) from error
            except KeyboardInterrupt:
                with _alone(INTERRUPTED):
                    console.stop(_interrupted(ctx), ctx.invoked_subcommand)
                raise typer.Exit(INTERRUPTED) from None
            except _ClickException as error:
                _emit_usage_error(error, ctx.invoked_subcommand)
                raise
            except Exception as error:
                with _alone(FAILED):
                    _report(error, ctx.invoked_subcommand)
                raise typer.Exit(FAILED) from error


def _emit_usage_error(error: Any, command: str | None) -> None:
    """Write a usage error, which Typer shows on stderr, as the one object of `--json`, and make it one line of text."""
    error.message = console.one_line(error.message or "")
    console.emit_error("UsageError", error.format_message(), command)


def _refuse_empty(ctx: Any, args: list[str]) -> None:
    """Refuse a value without a character, such as that of an unset variable in `--plan "$PLAN"`: nobody means it."""
    for before, argument in itertools.pairwise(args):
        option = argument.removesuffix("=") if argument.startswith("--") and argument.endswith("=") else before
        if "--prompt" not in (before, option) and (not argument or option != before):
            place = f"the value of {option}" if option.startswith("-") else f"the argument after '{option}'"
            ctx.fail(f"{place} is empty: write one, or leave it out")


def _say_repeated(ctx: Any, args: list[str]) -> None:
    """Say of an option that takes one value and has several which of them counts: scripts append to override."""
    _, _, order = ctx.command.make_parser(ctx).parse_args(args=list(args))
    for option in dict.fromkeys(order):
        takes_one = option.param_type_name == "option" and not (option.multiple or option.is_flag)
        if takes_one:
            say_which_counts(option.opts[0], order.count(option), args)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _add(name: str, command: Callable[..., None], summary: str, *examples: str) -> None:
    """Register a command; its help ends with the examples."""
    epilog = "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)
    app.command(name, short_help=summary, epilog=epilog, cls=GroupedCommand)(command)


_add(
    "profile",
    profile.profile,
    "Measure how important each layer's keys and values are.",
    "kvmix profile builtin:tiny",
    "kvmix profile Qwen/Qwen3-8B --score grad-norm,fisher --dtype bf16",
)
_add(
    "allocate",
    allocate.allocate,
    "Decide every layer's bits under a budget.",
    "kvmix allocate --avg-bits 2.3",
    "kvmix allocate --memory 8GiB --context 128K --method ilp",
)
_add(
    "run",
    run.run,
    "Generate with the quantized cache.",
    'kvmix run --prompt "Once upon a time"',
    "kvmix run Qwen/Qwen3-8B --uniform 4 --prompt-file notes.txt --chat",
)
_add(
    "eval",
    eval.evaluate,
    "Measure plans against the unquantized cache.",
    "kvmix eval --task longbench",
    'kvmix eval --plan rank-2.3 --baseline hf-quanto-4 --fail-if "perplexity>+1%"',
)
_add(
    "report",
    report.report,
    "Merge runs into tables and a page with plots.",
    "kvmix report",
    "kvmix report results --markdown report.md --metric recall",
)
_add(
    "inspect",
    inspect.inspect,
    "Show, validate or compare profiles and plans.",
    "kvmix inspect rank-2.3",
    "kvmix inspect rank-2.3 ilp-2.3 --plot plans.png",
)
_add(
    "fit",
    fit.fit,
    "Count the memory that a model and its cache need.",
    "kvmix fit Qwen/Qwen3-8B --context 32K --memory 24GiB",
    "kvmix fit builtin:tiny --plan rank-2.3 --batch 8",
)
_add(
    "export",
    export.export,
    "Write a plan for vLLM, ModelOpt, llama.cpp or KVTuner.",
    "kvmix export --to llama.cpp",
    "kvmix export rank-2.3 --to kvtuner --out preset.yaml",
)
_add(
    "recommend",
    recommend.recommend,
    "Find the smallest plan that is safe at your context.",
    "kvmix recommend builtin:tiny --context 2K",
    "kvmix recommend Qwen/Qwen3-8B --context 32K --memory 24GiB --max-loss 1%",
)
_add(
    "demo",
    demo.demo,
    "Run all of it on the built-in model, in a few minutes.",
    "kvmix demo --quick",
    "kvmix demo --out here --resume",
)
_add(
    "list",
    listing.list_kind,
    "List models, plans, presets, probes, solvers, tasks, ...",
    "kvmix list",
    "kvmix list presets",
)
_add(
    "env",
    listing.env,
    "Show versions, devices, kernels and folders, for bug reports.",
    "kvmix env",
    "kvmix env --json",
)


def main() -> None:
    """Run the command line of `kvmix`."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is loaded; spinning threads are slow
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _terminate)
    _open_streams()
    try:
        with put_off(), nullcontext() if current().leads else console.muted():
            app(prog_name="kvmix")
    except KeyboardInterrupt:  # before Typer has made its commands, or after one has ended
        console.stop("interrupted", None)
        sys.exit(INTERRUPTED)


def _terminate(number: int, frame: object) -> NoReturn:
    """Treat a signal as Ctrl-C, so that temporary folders are removed and the way to resume is said.

    A second one, as a shell sends when its terminal is closed, must not interrupt that.
    """
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _open_streams() -> None:
    """Prepare stdout and stderr: any character can be written, and a closed stream is not an exception."""
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the process runs
    if sys.stdout is None:
        console.alert("error: cannot write the output: stdout is closed")
        sys.exit(FAILED)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def _alone(code: int) -> Iterator[None]:
    """Within this block print what ends all ranks, on one of them.

    Args:
        code: exit code of all ranks.
    """
    if current().claim_failure(code):
        with console.unmuted():
            yield
    else:
        with console.muted():
            yield


def _report(error: Exception, command: str | None) -> None:
    """Report an exception that is not ours: no memory is left, a file of the user's raised it, or there is a bug."""
    if isinstance(error, OSError) and error.errno in OF_PATHS and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
        place = name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..."
        _fail_by(error, f"cannot use {place}: {error.strerror}; name another file or folder", command)
    elif is_out_of_memory(error):
        _fail_by(error, NO_MEMORY.format(error=first_sentence(error)), command)
    elif own := extension_error(error):
        console.fail(own, command)
    else:
        console.fail_bug(error, command)


def _fail_by(cause: Exception, message: str, command: str | None) -> None:
    """Report an error of ours with a cause, which `--traceback` shows."""
    error = KvmixError(message)
    error.__cause__ = cause
    console.fail(error, command)


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
    """Store the KV cache of a model in few bits: measure what matters, decide the bits, generate and evaluate.

    In this order: profile MODEL, allocate, run, eval. Each finds what the one before it wrote, under ./profiles.

    To see all of it without a model of your own: kvmix demo --quick
    """


def _interrupted(ctx: Any) -> str:
    line = ctx.meta[options.COMMAND_LINE]
    if ctx.invoked_subcommand == "recommend":
        return f"interrupted; continue with `{line}`"
    is_search = ctx.invoked_subcommand == "allocate" and "--method search" in line
    if ctx.invoked_subcommand not in RESUMABLE and not is_search:
        return "interrupted"
    if ctx.invoked_subcommand == "eval" and not console.mode.begun:
        return "interrupted before anything was measured; start again with the same command"
    return f"interrupted; continue with `{line if '--resume' in line else line + ' --resume'}`"


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Show a warning in one line; those meant for programmers only if verbose."""
    if isinstance(message, FieldsLeftOut):
        console.notice(str(message))
        console.mode.about.setdefault("texts", {})[message.source] = message.as_json()
        logging.getLogger("kvmix").info("%s", message)
    elif console.mode.verbose or not issubclass(category, (DeprecationWarning, FutureWarning)):
        console.alert(f"warning: {message}")
