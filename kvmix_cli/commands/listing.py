"""`kvmix list KIND` and `kvmix env`: what there is, and what it runs on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .. import console
from .options import CommonOptions, Model, ProfilesDir, expand, say_unused

MORE = {
    "tasks": "and every task of lm-eval, by its name there\n",
    "presets": "and kvtuner:FILE; presets are put together with a plus: mikv+rotate-2\n",
    "models": "and every hub id, folder and GGUF file of a causal language model that transformers reads\n",
}
"""Lines below a table, by kind."""


@expand
def list_kind(
    ctx: typer.Context,
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND", help="models, plans, presets, probes, solvers, tasks, policies, codecs or exports."
        ),
    ] = None,
    model: Model = None,
    profiles_dir: ProfilesDir = None,
    common: CommonOptions = CommonOptions(),
) -> None:
    """List everything of a kind, with one line each; without a kind, the names of all kinds."""
    from ..studies.listing import ListedItem, kinds, list_items

    if kind not in (None, "plans"):
        say_unused(ctx, ["model"], "is for plans")
    if kind is None:
        names = {each: [item.name for item in list_items(each, model)] for each in kinds()}
        found = [ListedItem(each, ", ".join(inside) or "none yet") for each, inside in names.items()]
    else:
        found = list_items(kind, model)
    if found:
        rows = [[item.name, item.summary] for item in found]
        console.table(kind or "what there is", ["name", "what it is"], rows, MORE.get(kind or "", ""))
    else:
        console.notice(f"no {kind} here")
    items = [{"name": item.name, "summary": item.summary, **dict(item.more)} for item in found]
    console.emit_json({"command": "list", "kind": kind, "items": items})


@expand
def env(profiles_dir: ProfilesDir = None, common: CommonOptions = CommonOptions()) -> None:
    """Show versions, devices, kernels, threads and folders, and what is missing: for bug reports."""
    from ..reporting.tables.environment import environment_tables
    from ..studies.environment import read_environment

    found = read_environment()
    for table in environment_tables(found):
        console.table(*table)
    console.emit_json({"command": "env", **asdict(found)})
