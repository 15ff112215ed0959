"""One registry for everything that has a name: probes, solvers, tasks, exports, policies, presets."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from .errors import KvmixError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries of one kind, loaded when they are first used.

    An entry is an object, or a place `"module:attribute"` below a package that is imported on first use.

        probes: Registry[type[Probe]] = Registry("score", KvmixError, __package__, {"kl": "kl:Kl"})
        probes["kl"]

    Args:
        noun: the kind of entry, for errors: "unknown score 'x'".
        error: the class of errors that are raised.
        package: where the modules of places are.
        places: entries by name.
    """

    def __init__(
        self, noun: str, error: type[KvmixError], package: str = "", places: Mapping[str, str] | None = None
    ) -> None:
        self._noun = noun
        self._error = error
        self._package = package
        self._entries: dict[str, T | str] = {}
        for name, place in (places or {}).items():
            self.add(name, place)

    def add(self, name: str, entry: T | str) -> None:
        """Register an entry, an object or a place. Raises ValueError if the name is taken."""
        if name in self._entries:
            raise ValueError(f"{self._noun} '{name}' is registered twice")
        self._entries[name] = entry

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers what it decorates under a name. Raises ValueError if the name is taken."""

        def add(entry: T) -> T:
            self.add(name, entry)
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """Return an entry. Raises the registry's error with the nearest names if there is none."""
        self.check(name)
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(f".{module}", self._package), attribute)
        return entry

    def check(self, name: str) -> None:
        """Raise the registry's error, with the nearest names, unless there is an entry of this name."""
        if name not in self._entries:
            known = ", ".join(self._entries)
            raise self._error(f"unknown {self._noun} '{name}'{did_you_mean(name, self)}; known are {known}")

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
