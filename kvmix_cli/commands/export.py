"""`kvmix export PLAN --to ENGINE`: write a plan in the form of another engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .. import console, state
from .options import CommonOptions, Model, ProfilesDir, expand


@dataclass(frozen=True)
class ExportOptions:
    """The plan, and the engine to write it for."""

    to: Annotated[str, typer.Option(metavar="ENGINE", help="vllm, modelopt, llama.cpp or kvtuner.")]
    plan: Annotated[
        str | None, typer.Argument(metavar="[PLAN]", help="File or name of a plan [default: the newest].")
    ] = None
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write [default: standard output].")] = None
    model: Model = None
    profiles_dir: ProfilesDir = None


@expand
def export(what: ExportOptions, common: CommonOptions) -> None:
    """Write a plan for another engine, if that engine can express it."""
    from ..export import TARGETS
    from ..files import write_text
    from ..plan import Plan

    target = TARGETS[what.to]
    path = state.find_plan(what.plan, model=what.model, say=console.notice)
    found = Plan.load(path)
    text = target.write(found)
    console.notice(f"caution: {target.caution}")
    if what.out is None:
        console.text(text)
    else:
        write_text(what.out, text)
        console.notice(f"wrote {what.out}")
    console.emit_json(
        {
            "command": "export",
            "model": found.model.id,
            "plan": path,
            "to": what.to,
            "text": text,
            "out": what.out,
            "caution": target.caution,
        }
    )
