"""`kvmix export PLAN --to ENGINE`: a plan as another engine is told it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import console, state
from . import options


def export(
    to: Annotated[str, typer.Option(metavar="ENGINE", help="vllm, modelopt, llama.cpp or kvtuner.")],
    plan: Annotated[
        str | None, typer.Argument(metavar="[PLAN]", help="File or name of a plan [default: the newest].")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write [default: standard output].")] = None,
    model: options.Model = None,
    profiles_dir: options.ProfilesDir = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a plan for another engine, if that engine can express it."""
    from ..export import TARGETS
    from ..files import write_text
    from ..plan import Plan

    target = TARGETS[to]
    path = state.find_plan(plan, model=model)
    found = Plan.load(path)
    text = target.write(found)
    console.notice(f"caution: {target.caution}")
    if out is None:
        console.text(text)
    else:
        write_text(out, text)
        console.notice(f"wrote {out}")
    console.emit_json(
        {
            "command": "export",
            "model": found.model.id,
            "plan": path,
            "to": to,
            "text": text,
            "out": out,
            "caution": target.caution,
        }
    )
