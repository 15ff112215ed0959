"""Strict YAML: plan, profile and preset files as plain data, with the line of every value.

YAML is data here, never code: no tags, no anchors or aliases (so no expansion attacks), no duplicate keys, one
document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ...errors import DocumentError, did_you_mean, together
from ...files import behind_links
from .known_keys import known_keys

MAX_BYTES = 4 * 2**20
"""Bytes of a file. A profile of 10,000 layers, the most that a plan may have, takes a third of it."""
MAX_SCALAR = 2**18
"""Characters of one value. The short form of 10,000 layers, the longest, takes less than half of it."""
MAX_DEPTH = 16
LINE_BREAKS = "\n\r\x85\u2028\u2029"
MAX_DIGITS, MAX_INT_BITS = 100, 64

Location = tuple[Any, ...]
Fault = tuple[Location, str]
ModelT = TypeVar("ModelT", bound=BaseModel)

_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)\Z"),
    "tag:yaml.org,2002:float": re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}
"""Numbers of YAML 1.1 without those to base 60 (`1:30`), which take quadratic time to read."""


def strict_loader(base: Any) -> Any:
    """Return a loader class of PyYAML's that reads `1:30` as text, as YAML 1.2 does."""
    resolvers = {
        first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in patterns]
        for first, patterns in base.yaml_implicit_resolvers.items()
    }
    return type("StrictLoader", (base,), {"yaml_implicit_resolvers": resolvers})


_Loader: Any = strict_loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader))
"""libyaml's parser where PyYAML was built with it: ten times faster, same rules."""


class _OneLineDumper(yaml.SafeDumper):
    """A writer that escapes line breaks in text. PyYAML folds them, and reads some of them back as other characters."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(character in data for character in LINE_BREAKS) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_OneLineDumper.add_representer(str, _OneLineDumper.represent_str)


class _FastDumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """The same with libyaml's emitter where PyYAML was built with it: four times faster."""


_FastDumper.add_representer(str, _OneLineDumper.represent_str)
_WRITTEN_OTHERWISE = ("\\U", "? ", "'': ")
"""Signs in libyaml's text of what PyYAML writes otherwise: characters above U+FFFF, keys with a line break or empty."""


class StrictModel(BaseModel):
    """A part of a file: frozen, without unknown keys, and without conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Faults(ValueError):
    """Several faults that a validator found, each with the path of keys to it."""

    def __init__(self, found: Iterable[Fault]) -> None:
        self.found = tuple(found)
        super().__init__(together([message for _, message in self.found]))


@dataclass
class Document:
    """Parsed YAML: plain data, and the line of every value by its path of keys; the first line is 1."""

    source: str
    data: Any
    lines: dict[Location, int] = field(default_factory=dict)

    def line(self, location: Location) -> int:
        """Return the line of a value, or of the nearest value around it that is in the file."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 1)

    def error(self, faults: Iterable[Fault]) -> DocumentError:
        """Return an error that lists all faults, in the order of their lines."""
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
        DocumentError: if the file cannot be read, is too large, or breaks a rule of this module.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise DocumentError(str(path), [f"larger than {MAX_BYTES >> 20} MiB, the most that a kvmix file can be"])
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
        DocumentError: if there is any fault.
    """
    try:
        checked = model.model_validate(document.data, context={"folder": behind_links(Path(document.source)).parent})
    except ValidationError as error:
        raise document.error([*_faults(error, document, model), *also]) from error
    if also:
        raise document.error(also)
    return checked


def reason(error: ValueError) -> str:
    """Return the faults that a validation of plain values found, as one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    return together([message for _, message in _faults(error, None)])


def flow(value: Any) -> str:
    """Return plain data as one line of YAML, which reads back as the same data.

    The text does not depend on how PyYAML was built, since checksums are taken of it.
    """
    options: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "width": 10**6, "allow_unicode": True}
    text: str = yaml.dump(value, Dumper=_FastDumper, **options)
    if any(sign in text for sign in _WRITTEN_OTHERWISE):
        text = yaml.dump(value, Dumper=_OneLineDumper, **options)
    return text.removesuffix("\n").removesuffix("\n...")


def head_comment(command: str) -> list[str]:
    """Return comment lines with the command that made a file; characters that YAML cannot hold become `?`."""
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
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_SCALAR:
            yield line, f"a value of {len(event.value)} characters; at most {MAX_SCALAR} are allowed"
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
        return _scalar(loader, node)
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = _scalar(loader, key_node)
        if not isinstance(key, (str, int, float, bool, type(None))):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
        location = (*at, key)
        if key in mapping:
            repeated.append((location, f"'{key}' is given twice"))
        document.lines[location] = key_node.start_mark.line + 1
        mapping[key] = _construct(loader, value_node, location, document, repeated)
    return mapping


def _scalar(loader: Any, node: yaml.Node) -> Any:
    """Return a value of the loader's; an integer must fit into 64 bits, so that it can be printed and hashed fast."""
    is_long = node.tag in _NUMBERS and len(node.value) > MAX_DIGITS
    value = None if is_long else loader.construct_object(node, deep=True)
    if is_long or (isinstance(value, int) and value.bit_length() > MAX_INT_BITS):
        limit = f"{MAX_DIGITS} digits" if is_long else f"{MAX_INT_BITS} bits"
        raise yaml.constructor.ConstructorError(None, None, f"a number has more than {limit}", node.start_mark)
    return value


def _faults(error: ValidationError, document: Document | None, model: type[BaseModel] | None = None) -> Iterator[Fault]:
    for fault in error.errors():
        location = _location(fault["loc"], document)
        own = fault.get("ctx", {}).get("error")
        if isinstance(own, Faults):
            yield from (((*location, *at), message) for at, message in own.found)
        else:
            yield location, _message(fault, location) + _nearest(fault, model)


def _nearest(fault: Any, model: type[BaseModel] | None) -> str:
    """Return a hint at the key that an unknown one was meant to be; nothing for other faults."""
    if model is None or fault["type"] != "extra_forbidden":
        return ""
    name = str(fault["loc"][-1])
    return did_you_mean(name, sorted(known_keys(model, fault["loc"]) - {name}))


def _location(loc: tuple[int | str, ...], document: Document | None) -> Location:
    """Return pydantic's location without the names of union members, which are not in the file."""
    if document is None:
        return loc
    at: Location = ()
    for part in loc:
        for key in (part, int(part) if isinstance(part, str) and part.isdecimal() and len(part) < MAX_DIGITS else part):
            if (*at, key) in document.lines:
                at = (*at, key)
                break
    return at


def _message(fault: Any, location: Location) -> str:
    name = ".".join(_short(str(part)) for part in location)
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
    """Return a value of a file as an error quotes it, never long."""
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    return "nothing" if value is None else _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
