"""Identity of a run: all that its numbers depend on, and the name of its folder, without torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..journal import HASH_DIGITS, plain, short_hash

FORMAT = "kvmix-run/1"
SHARED = ("kvmix", "model", "dtype", "device", "attention", "settings")
"""Keys of a config that do not depend on its task and plan."""
PART_BYTES = 78
"""Bytes of a task, model or plan in a folder's name: three of them, a hash and what joins them stay below 255."""
_HASH = re.compile(rf"__[0-9a-f]{{{HASH_DIGITS}}}$")

Config = Mapping[str, Any]
"""Everything that a run's numbers depend on, as plain data."""


def identity(config: Config) -> str:
    """Return the hash of all settings that a run's numbers depend on, for the name of its folder; "" for none.

    The limit is left out: the samples themselves are in it.
    """
    if not config:
        return ""
    return short_hash(compared(config))


def plan_of(folder: Path, config: Config) -> str:
    """Return the plan in a run folder's name."""
    return folder.name.removesuffix(f"__{identity(config)}").split("__", 2)[-1]


def checksum(samples: Sequence[Any]) -> str:
    """Return the SHA-256 of samples, by their content."""
    return hashlib.sha256(repr(samples).encode()).hexdigest()


def short_checksum(results: Sequence[Any]) -> str:
    """Return the digits of results in the name of a file that shows them."""
    return checksum(results)[:HASH_DIGITS]


def safe_name(name: str) -> str:
    """Return a name as part of a file's name, at most `PART_BYTES` long, and still different for different names."""
    safe = re.sub(r"[^\w.+-]+", "-", name)
    if safe == name and len(safe.encode()) <= PART_BYTES:
        return safe
    digits = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:HASH_DIGITS]
    return f"{safe.encode()[: PART_BYTES - HASH_DIGITS - 1].decode(errors='ignore')}-{digits}"


def old_name(task: str, model: str, plan: str) -> str:
    """Return the name of a run folder in version 0.1, which had no hash."""
    parts = []
    for name in (task, plan):
        safe = re.sub(r"[^\w.+-]+", "-", name)[:80]
        digits = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:HASH_DIGITS]
        parts.append(safe if safe == name else f"{safe}-{digits}")
    return f"{parts[0]}__{model}__{parts[1]}"


def with_samples(config: Config, samples: Sequence[Any]) -> Config:
    """Return settings with what makes them those of a run, as plain data."""
    counted = {"count": len(samples), "sha256": checksum(samples)}
    return plain({"format": FORMAT, **config, "samples": counted})


def compared(config: Config, head: str = "") -> dict[str, Any]:
    """Return all settings that two equal runs share, flat: `settings.length`. Their limits may differ."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping) and value
        flat.update(compared(value, f"{head}{key}.") if nested else {f"{head}{key}": value})
    flat.pop("settings.limit", None)
    return flat


def without_samples(config: Config) -> dict[str, Any]:
    """Return all that two equal runs share, without their samples."""
    return {key: value for key, value in compared(config).items() if not key.startswith("samples.")}


def independent(config: Config) -> dict[str, Any]:
    """Return the settings that do not depend on the task and the plan."""
    return {key: value for key, value in compared(config).items() if key.split(".")[0] in SHARED}


def without_hash(name: str) -> str:
    """Return the name of a run folder without the hash of its settings."""
    return _HASH.sub("", name)
