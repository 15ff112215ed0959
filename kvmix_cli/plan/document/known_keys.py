"""Keys that a file may have at a place, by the pydantic model that it is checked against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel


def known_keys(model: type[BaseModel], place: Sequence[int | str]) -> set[str]:
    """Return the keys that may stand beside a key.

    Args:
        model: of the whole file.
        place: of the key, as pydantic writes it: keys and indices from the root on, and names of union members.
    """
    found = [model]
    for part in place[:-1]:
        inside = [each for kind in found if part in kind.model_fields for each in _models_of(kind, str(part))]
        found = inside or [kind for kind in found if _is_member(kind, part)] or found
    return {name for kind in found for name in kind.model_fields}


def _models_of(kind: type[BaseModel], field: str) -> Iterator[type[BaseModel]]:
    return _models(kind.model_fields[field].annotation)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in an annotation, also those inside of unions and containers."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _is_member(kind: type[BaseModel], part: int | str) -> bool:
    """Return whether pydantic's name of a union member, its class or its `kind`, is that of a model."""
    return part == kind.__name__ or any(field.default == part for field in kind.model_fields.values())
