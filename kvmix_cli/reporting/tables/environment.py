"""What kvmix runs on, as tables."""

from __future__ import annotations

from typing import Any

from ...counting import counted
from ...evaluation.results import Table
from ...plan.sizes import format_bytes
from ...studies.environment import Environment


def environment_tables(found: Environment) -> list[Table]:
    """Return what kvmix runs on as a table of facts, and what is missing as another if anything is."""
    rows = [[name, version] for name, version in found.versions.items() if version is not None]
    rows += [[device["kind"], _device(device)] for device in found.devices]
    rows += [[f"{name} kernels", _kernels(kernels)] for name, kernels in found.kernels.items()]
    rows += [["threads", ", ".join(f"{name} {count}" for name, count in found.threads.items() if count is not None)]]
    rows += [[f"{name} in", folder] for name, folder in found.folders.items()]
    tables = [Table("environment", ["", ""], rows, "")]
    if found.missing:
        missing = [[each["what"], each["for"], each["get"]] for each in found.missing]
        tables.append(Table("missing", ["what", "for", "how to get it"], missing, ""))
    return tables


def _device(device: dict[str, Any]) -> str:
    parts = [str(device["name"])]
    parts += [f"{counted(device['processors'], 'processor')}"] if "processors" in device else []
    parts += [format_bytes(device["memory_bytes"])] if device.get("memory_bytes") else []
    parts += [f"capability {device['capability']}"] if "capability" in device else []
    return ", ".join(parts)


def _kernels(kernels: dict[str, Any]) -> str:
    return str(kernels["in_use"]) if kernels["in_use"] else f"none: {kernels['reason']}"
