"""Settings of a command from a YAML file: `--config run.yaml`, with names of options as keys.

    # kvmix eval --config run.yaml
    model: builtin:tiny
    task: perplexity,recall
    uniform: [2, 4]
    length: 2K
    resume: true

The file's settings are put into the command line, before what was given there, which therefore wins. So they are read,
checked and refused as any other option, and files that the command writes begin with the whole command, without the
file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import console
from ..errors import did_you_mean

OPTION = "--config"
NOT_IN_A_FILE = ("config", "help")

Config = Annotated[
    Path | None,
    typer.Option(OPTION, metavar="FILE.yaml", help="Settings by names of options; what is given here as well wins."),
]
"""The option, for help alone: its settings are in the command line before this is parsed."""


def with_settings(command: Any, ctx: Any, arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command with the settings of the file that `--config` names; as they are without one.

    Args:
        command: click's command.
        ctx: the context that it runs in.

    Raises:
        DocumentError: with every fault of the file, each with its line.
    """
    files, rest = _split(arguments)
    if not files:
        return list(arguments)
    say_which_counts(OPTION, len(files), arguments)
    file = files[-1]
    from ..plan.document.strict_yaml import read_yaml

    document = read_yaml(Path(file))
    if not isinstance(document.data, dict):
        raise document.error([((), "expected a file of settings, such as `limit: 3`")])
    known = _names(command, ctx)
    given = _given(command, ctx, rest)
    added: list[str] = []
    last: list[str] = []
    faults = []
    seen: dict[str, Any] = {}
    for key, value in document.data.items():
        name = str(key).replace("_", "-").removeprefix("--")
        parameter = known.get(name)
        if parameter is None:
            faults.append(((key,), f"no option '{key}' of kvmix {command.name}{did_you_mean(name, known)}"))
        elif seen.setdefault(name, key) != key:
            faults.append(((key,), f"'{key}' and '{seen[name]}' are one option"))
        elif (fault := _fault(parameter, value)) is not None:
            faults.append(((key,), f"{key}: {fault}"))
        elif value is not None and not given & {parameter.name, name}:
            (last if _is_argument(parameter) else added).extend(_words(parameter, name, value))
    if faults:
        raise document.error(faults)
    return [*added, *rest, *last]


def say_which_counts(option: str, times: int, arguments: Sequence[str]) -> None:
    """Say that of several values of an option the last one counts, unless the arguments ask for quiet."""
    if times > 1 and not {"-q", "--quiet"} & set(arguments):
        console.notice(f"{option} is given {times} times: the last one counts")


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files that `--config` names, and the other arguments."""
    files, rest, words = [], [], iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == OPTION:
            file = next(words, None)
            if file is None:
                rest.append(word)  # without a file, the command itself refuses it
            else:
                files.append(file)
        elif word.startswith(f"{OPTION}="):
            files.append(word.removeprefix(f"{OPTION}="))
        else:
            rest.append(word)
    return files, rest


def _names(command: Any, ctx: Any) -> dict[str, Any]:
    """Return the parameters of a command by the names that a file may have for them."""
    parameters = [each for each in command.get_params(ctx) if each.name not in NOT_IN_A_FILE]
    arguments = {_argument_name(each): each for each in parameters if _is_argument(each)}
    options = {
        name.removeprefix("--"): each
        for each in parameters
        if not _is_argument(each)
        for name in each.opts
        if name.startswith("--")
    }
    return {**arguments, **options}


def _given(command: Any, ctx: Any, arguments: Sequence[str]) -> set[str]:
    """Return the parameters that are in the arguments, by name, and options that an argument stands for (`MODEL`)."""
    own = typer.Context(command, parent=ctx)
    found, _, _ = command.make_parser(own).parse_args(args=list(arguments))
    given = {name for name, value in found.items() if value not in (None, ())}
    parameters = [each for each in command.get_params(own) if _is_argument(each)]
    return given | {_argument_name(each) for each in parameters if each.name in given}


def _argument_name(parameter: Any) -> str:
    """Return the name that a file has for an argument: `model` for `MODEL`."""
    return str(parameter.metavar or parameter.name).strip("[].").lower()


def _fault(parameter: Any, value: Any) -> str | None:
    """Return why a parameter cannot have a value of a file; None if it may."""
    if value is None:
        return None
    if _is_flag(parameter):
        return None if isinstance(value, bool) else f"must be true or false, got {value!r}"
    plain = value if isinstance(value, list) else [value]
    if not all(isinstance(each, (str, int, float)) and not isinstance(each, bool) for each in plain):
        return f"must be text, a number or a list of them, got {value!r}; put words like yes and on in quotes"
    return None


def _words(parameter: Any, name: str, value: Any) -> Iterator[str]:
    """Yield the words of a command line that stand for a value."""
    if _is_argument(parameter):
        yield from map(str, value if isinstance(value, list) else [value])
    elif _is_flag(parameter):
        names = parameter.opts if value else parameter.secondary_opts
        yield from names[:1]
    elif isinstance(value, list) and parameter.multiple:
        for each in value:
            yield from (f"--{name}", str(each))
    else:
        yield from (f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value))


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _is_flag(parameter: Any) -> bool:
    return bool(getattr(parameter, "is_flag", False))
