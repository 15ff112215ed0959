"""Reading YAML strictly and writing files whole.

YAML is data here, never code: no tags, no anchors or aliases (so no bombs), no duplicate keys, one document. Every
value keeps its line, so that a validation error can say where it is. Files are written under a temporary name and
renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from .errors import DocumentError, OutputError

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 16

Location = tuple[Any, ...]
ModelT = TypeVar("ModelT", bound=BaseModel)


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

    def fail(self, faults: list[tuple[Location, str]]) -> None:
        """Raise all faults at once, in the order of their lines; nothing if there are none."""
        if faults:
            ordered = sorted((self.line(location), message) for location, message in faults)
            raise DocumentError(self.source, [f"line {line}: {message}" for line, message in ordered])


def read_yaml(path: Path) -> Document:
    """Read one YAML document from a file.

    Raises:
        DocumentError: if it cannot be read or breaks a rule of this module.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DocumentError(str(path), [f"larger than {MAX_BYTES >> 20} MiB; this is no kvmix file"])
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DocumentError(str(path), [f"cannot be read: {reason}"]) from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Document:
    """Parse one YAML document; `source` names it in errors. Raises DocumentError."""
    try:
        faults = [f"line {line}: {message}" for line, message in _forbidden(text)]
        if faults:
            raise DocumentError(source, faults)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        document = Document(source, None)
        repeated: list[tuple[Location, str]] = []
        document.data = None if node is None else _construct(loader, node, (), document, repeated)
        document.fail(repeated)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise DocumentError(source, [f"{where}not valid YAML: {getattr(error, 'problem', None) or error}"]) from error
    return document


def validate(document: Document, model: type[ModelT]) -> ModelT:
    """Check a document against a pydantic model and report every fault with its line. Raises DocumentError."""
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        document.fail([(_location(fault["loc"], document), _message(fault)) for fault in error.errors()])
        raise AssertionError("a ValidationError has at least one fault") from error


def flow(value: Any) -> str:
    """One-line YAML of plain data."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all, with its folders. Raises OutputError."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all, with its folders. Raises OutputError."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _forbidden(text: str) -> Iterator[tuple[int, str]]:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
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


def _construct(
    loader: yaml.SafeLoader, node: yaml.Node, at: Location, document: Document, repeated: list[tuple[Location, str]]
) -> Any:
    document.lines[at] = node.start_mark.line + 1
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
        value = _construct(loader, value_node, location, document, repeated)
        if key in mapping:
            repeated.append((location, f"'{key}' is given twice"))
        mapping[key] = value
    return mapping


def _location(loc: tuple[int | str, ...], document: Document) -> Location:
    """Pydantic's location without the names of union members, which are not in the file."""
    at: Location = ()
    for part in loc:
        for key in (part, int(part) if isinstance(part, str) and part.isdigit() else part):
            if (*at, key) in document.lines:
                at = (*at, key)
                break
    return at


def _message(fault: Any) -> str:
    name = ".".join(str(part) for part in fault["loc"]) or "the file"
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{name}'"
    if fault["type"] == "missing":
        return f"'{name}' is missing"
    reason = fault["msg"].removeprefix("Value error, ")
    return f"{name}: {reason[0].lower()}{reason[1:]}"
