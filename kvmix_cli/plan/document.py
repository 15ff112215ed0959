"""Strict YAML: plan, profile and preset files as plain data, with the line of every value.

YAML is data here, never code: no tags, no anchors or aliases (so no expansion attacks), no duplicate keys, one
document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import DocumentError

MAX_BYTES = 4 * 2**20
"""A profile of 10,000 layers, the most that a plan may have, takes a third of it."""
MAX_DEPTH = 16

Location = tuple[Any, ...]
Fault = tuple[Location, str]
ModelT = TypeVar("ModelT", bound=BaseModel)

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's parser where PyYAML was built with it: ten times faster, same rules."""


class Faults(ValueError):
    """Several things that a validator finds wrong, each with the path of keys to it."""

    def __init__(self, found: Iterable[Fault]) -> None:
        self.found = tuple(found)
        super().__init__("; ".join(message for _, message in self.found))


@dataclass
class Document:
    """Parsed YAML: plain data, and the line (from 1) of every value by its path of keys."""

    source: str
    data: Any
    lines: dict[Location, int] = field(default_factory=dict)

    def line(self, location: Location) -> int:
        """Line of a value, or of the nearest thing around it that is in the file."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 1)

    def error(self, faults: Iterable[Fault]) -> DocumentError:
        """All faults at once, in the order of their lines."""
        ordered = sorted((self.line(location), message) for location, message in dict.fromkeys(faults))
        return DocumentError(self.source, [f"line {line}: {message}" for line, message in ordered])

    def check_format(self, expected: str) -> None:
        """Raise DocumentError unless this is a mapping with `format: <expected>`."""
        if not isinstance(self.data, dict):
            raise self.error([((), f"expected a file with `format: {expected}`, got {_shown(self.data)}")])
        if "format" not in self.data:
            raise self.error([((), f"'format' is missing; it must be '{expected}'")])
        if self.data["format"] != expected:
            raise self.error([(("format",), f"format must be '{expected}', got {_shown(self.data['format'])}")])


def read_yaml(path: Path) -> Document:
    """Read one YAML document from a file.

    Raises:
        DocumentError: if it cannot be read or breaks a rule of this module.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise DocumentError(str(path), [f"larger than {MAX_BYTES >> 20} MiB; this is no kvmix file"])
        return parse_yaml(data.decode("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DocumentError(str(path), [f"cannot be read: {why}"]) from error


def parse_yaml(text: str, source: str) -> Document:
    """Parse one YAML document; `source` names it in errors. Raises DocumentError."""
    try:
        faults = [f"line {line}: {message}" for line, message in _forbidden(text)]
        if faults:
            raise DocumentError(source, faults)
        loader = _Loader(text)
        node = loader.get_single_node()
        document = Document(source, None)
        repeated: list[Fault] = []
        document.data = None if node is None else _construct(loader, node, (), document, repeated)
        if repeated:
            raise document.error(repeated)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        why = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise DocumentError(source, [f"{where}not valid YAML: {why}"]) from error
    return document


def validate(document: Document, model: type[ModelT], also: Sequence[Fault] = ()) -> ModelT:
    """Check a document against a pydantic model and report every fault with its line.

    Args:
        also: faults that are known already, to be reported with the rest.

    Raises:
        DocumentError: if there is any.
    """
    try:
        checked = model.model_validate(document.data)
    except ValidationError as error:
        raise document.error([*_faults(error, document), *also]) from error
    if also:
        raise document.error(also)
    return checked


def reason(error: ValueError) -> str:
    """What a validation of plain values found wrong, in one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(message for _, message in _faults(error, None))


def flow(value: Any) -> str:
    """One-line YAML of plain data."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def head_comment(command: str) -> list[str]:
    """The lines with which a file says how it was made; what YAML could not hold is replaced."""
    return [
        "# " + "".join(character if character.isprintable() else "?" for character in line)
        for line in command.splitlines()
    ]


def _forbidden(text: str) -> Iterator[tuple[int, str]]:
    depth = 0
    event: Any
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            yield line, f"nested deeper than {MAX_DEPTH}"
            return
        if isinstance(event, yaml.AliasEvent):
            yield line, f"aliases are not allowed (*{event.anchor})"
        elif getattr(event, "anchor", None):
            yield line, f"anchors are not allowed (&{event.anchor})"
        elif getattr(event, "tag", None):
            yield line, f"tags are not allowed ({event.tag})"


def _construct(loader: Any, node: yaml.Node, at: Location, document: Document, repeated: list[Fault]) -> Any:
    document.lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*at, i), document, repeated) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, (str, int, float, bool, type(None))):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
        location = (*at, key)
        if key in mapping:
            repeated.append((location, f"'{key}' is given twice"))
        document.lines[location] = key_node.start_mark.line + 1
        mapping[key] = _construct(loader, value_node, location, document, repeated)
    return mapping


def _faults(error: ValidationError, document: Document | None) -> Iterator[Fault]:
    """Where and what, for every fault that pydantic found or that a validator of ours has raised as `Faults`."""
    for fault in error.errors():
        location = _location(fault["loc"], document)
        own = fault.get("ctx", {}).get("error")
        if isinstance(own, Faults):
            yield from (((*location, *at), message) for at, message in own.found)
        else:
            yield location, _message(fault, location)


def _location(loc: tuple[int | str, ...], document: Document | None) -> Location:
    """Pydantic's location without the names of union members, which are not in the file."""
    if document is None:
        return loc
    at: Location = ()
    for part in loc:
        for key in (part, int(part) if isinstance(part, str) and part.isdecimal() else part):
            if (*at, key) in document.lines:
                at = (*at, key)
                break
    return at


def _message(fault: Any, location: Location) -> str:
    name = ".".join(str(part) for part in location)
    last = fault["loc"][-1] if fault["loc"] else ""
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{name}'"
    if fault["type"] == "missing":
        return f"'{name}.{last}' is missing" if name and location[-1] != last else f"'{last}' is missing"
    if fault["type"] == "value_error":
        return f"{name}: {fault['ctx']['error']}" if name else str(fault["ctx"]["error"])
    what = f"the key {name}" if last == "[key]" else name or "the file"
    why = fault["msg"]
    if why.startswith("Input should"):
        return f"{what}: {why.removeprefix('Input ')}, got {_shown(fault['input'])}"
    return f"{what}: {why[0].lower()}{why[1:]}"


def _shown(value: Any) -> str:
    """A value of a file as an error quotes it, never long."""
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
