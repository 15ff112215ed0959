"""Options that commands share, and the decorator that lets a command take its options as dataclasses.

    @dataclass(frozen=True)
    class ExportOptions:
        to: Annotated[str, typer.Option(metavar="ENGINE", help="...")]

    @expand
    def export(ctx: typer.Context, what: ExportOptions, common: CommonOptions) -> None: ...

Typer sees one parameter for each field, in the order of the dataclasses and of their fields. A dataclass checks what
its options say about each other when it is made, so before a command imports anything that takes time.

`--json`, `-v`, `-q`, `--traceback`, `--profiles-dir` and `--threads` take effect when they are parsed; a command only
has to declare them.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from .. import console, state
from ..counting import counted
from ..extensions import load_extension
from .settings_file import Config
from .values import count_option, parse_encode, parse_model_dtype, parse_seed

if TYPE_CHECKING:
    from ..models.loading import LoadedModel

COMMAND_LINE = "kvmix.command_line"
"""Key of `ctx.meta`: the command line as it was given, e.g. `kvmix allocate --avg-bits 2.3`."""
ENCODE_ALONE = "--encode is for --uniform; a plan file has `encode` in its cache section"
"""Message for an encoder without a width that it encodes."""


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command for Typer, with an option for each field of the dataclasses that the command takes."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _parameters(groups[name])
        else:
            annotation = hints[name]
            parameters.append(parameter.replace(annotation=annotation, kind=inspect.Parameter.KEYWORD_ONLY))

    def expanded(**values: Any) -> None:
        console.mode.about["options"] = _stated(values)
        records = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**records, **values)

    expanded.__name__, expanded.__doc__ = command.__name__, command.__doc__
    vars(expanded)["__signature__"] = inspect.Signature(parameters)
    return expanded


def _stated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as `--json` states them: without those that have no value or only change what is shown."""
    hidden = {"ctx", *(field.name for field in fields(CommonOptions))}
    names = {"argument": "model", "option": "model"}
    return {names.get(name, name): _writable(value) for name, value in given(values).items() if name not in hidden}


def _writable(value: Any) -> Any:
    """Return a value as JSON can have it: NaN and Inf, which options are refused for later, as text."""
    if isinstance(value, list | tuple):
        return [_writable(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that were given."""
    return {name: value for name, value in options.items() if value is not None and value is not False and value != []}


def refuse(options: Mapping[str, Any], reason: str) -> None:
    """Raise typer.BadParameter for any option that was given."""
    for name in given(options):
        raise typer.BadParameter(f"--{name.replace('_', '-')} {reason}")


def was_given(ctx: Any, *names: str) -> bool:
    """Return whether one of these parameters of the command was given, be it with the value that it has anyway."""
    sources = [ctx.get_parameter_source(name) for name in names]
    return any(source is not None and not source.name.startswith("DEFAULT") for source in sources)


def say_unused(ctx: Any, names: Iterable[str], reason: str) -> None:
    """Say of options that were given and change nothing that they do not, and why.

    Args:
        ctx: context of the command.
        names: parameters of the command, `calibration` for `--calibration`.
        reason: what they are for, or why they are not used: `is for --method search`.
    """
    own = {each.name: each for each in ctx.command.params}
    for name in names:
        if was_given(ctx, name):
            console.notice(f"{own[name].opts[0]} {reason}: it changes nothing here")


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _use_threads(threads: int | None) -> int | None:
    """Let torch and the native kernels, which follow it, use so many threads."""
    if threads is None:
        return None
    if not 1 <= threads <= processors():
        most = counted(processors(), "processor")
        raise typer.BadParameter(f"{threads} threads: this process has {most}; use 1 to that many")
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:  # it has read the environment already
        sys.modules["torch"].set_num_threads(threads)
    return threads


def _set_mode(name: str, value: bool) -> bool:
    setattr(console.mode, name, value)
    return value


def _set_verbose(value: bool) -> bool:
    logging.getLogger("kvmix").setLevel(logging.INFO if value else logging.NOTSET)
    return _set_mode("verbose", value)


def _import(files: list[Path] | None) -> list[Path] | None:
    """Run files of the user's own as soon as they are named. Raises ExtensionError."""
    for file in files or ():
        load_extension(file)
    return files


def _use_dir(folder: Path | None) -> Path | None:
    state.use_dir(folder)
    return folder


Encoding = Annotated[
    Any,
    typer.Option(
        "--encode",
        metavar="HOW",
        parser=parse_encode,
        help="Choice of scales: minmax, refit, search, or fitted: refit for keys, search for values [default: minmax].",
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="ID", help="Hub id, local folder or builtin:tiny; needed if several have files."),
]
Seed = Annotated[int, typer.Option(metavar="N", parser=parse_seed, help="Seed of all random choices.")]
Threads = Annotated[
    int | None, count_option("Threads on the CPU [default: torch's own choice].", least=None, callback=_use_threads)
]
ProfilesDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        callback=_use_dir,
        help="Where profiles and plans are kept [default: ./profiles, or $KVMIX_PROFILES_DIR].",
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """The model, which every command that loads one takes as an argument or as an option."""

    argument: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Hub id, local folder or builtin:tiny, as --model.")
    ] = None
    option: Model = None
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit of the model on the hub.")
    ] = None

    def __post_init__(self) -> None:
        """Raise typer.BadParameter for two different models."""
        if None not in (self.argument, self.option) and self.argument != self.option:
            raise typer.BadParameter(f"two models, {self.argument} and --model {self.option}: give one")

    @property
    def model(self) -> str | None:
        """Return the model's id; None if there is none."""
        return self.argument or self.option

    @property
    def needed(self) -> str:
        """Return the model's id. Raises typer.BadParameter if there is none."""
        if self.model is None:
            raise typer.BadParameter("name the model: a hub id, a local folder or builtin:tiny")
        return self.model


@dataclass(frozen=True)
class LoadingOptions:
    """Options of a command that loads a model."""

    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE", parser=parse_model_dtype, help="auto (the checkpoint's), float32, bfloat16 or float16."
        ),
    ] = "auto"
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, or map (spread over GPUs).")
    ] = "auto"
    seed: Seed = 0
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Take pickled weights (*.bin) where there are no safetensors.")
    ] = False
    threads: Threads = None
    profiles_dir: ProfilesDir = None

    def load(self, model: str, revision: str | None, **more: Any) -> LoadedModel:
        """Load a model as the options say, with `more` options of `load_model`. Raises ModelError."""
        from ..models.loading import load_model

        return load_model(
            model,
            revision=revision,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
            **more,
        )


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
Traceback = Annotated[
    bool,
    typer.Option("--traceback", callback=lambda value: _set_mode("traceback", value), help="Tracebacks of errors."),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=lambda value: _set_mode("quiet", value), help="No notices, no progress bars."
    ),
]


Imports = Annotated[
    list[Path] | None,
    typer.Option(
        "--import",
        metavar="FILE.py",
        callback=_import,
        help="Run a Python file first, which registers scores, codecs, transforms or probes of your own; repeatable.",
    ),
]


@dataclass(frozen=True)
class CommonOptions:
    """Options of every command: where settings are, what runs first, and how it shows its results."""

    config: Config = None
    imports: Imports = None

    json: Json = False
    verbose: Verbose = False
    traceback: Traceback = False
    quiet: Quiet = False
