"""`kvmix profile MODEL`: how important are each layer's keys and values?"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console, state
from ..errors import KvmixError
from . import options

if TYPE_CHECKING:
    from ..profile import Profile
    from ..profiling import Probe


def profile(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder or builtin:tiny.")],
    score: Annotated[str, typer.Option(metavar="NAME", help="What to measure: grad-norm (the paper).")] = "grad-norm",
    calibration: Annotated[
        str, typer.Option(metavar="TEXT", help="builtin, a file, a folder, a .jsonl, or hub:NAME[:CONFIG[:SPLIT]].")
    ] = "builtin",
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Samples of text.")] = 30,
    seq_len: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of a sample.")] = 1024,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write [default: profiles/<org>--<model>/profile.yaml]."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw the scores by layer.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted profile stopped.")] = False,
    checkpointing: Annotated[
        bool | None,
        typer.Option("--checkpointing/--no-checkpointing", help="Save memory for time [default: for large models]."),
    ] = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    profiles_dir: options.ProfilesDir = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure how important each layer's keys and values are, on calibration text."""
    path = out or state.profile_path(model)
    _check_outputs(path, plot)
    from ..models import load_model
    from ..profiling import run_profile
    from ..texts import load_texts
    from .show import score_json, show_profile

    probe = _probe(score, checkpointing)
    texts = load_texts(calibration, seed=seed)
    loaded = load_model(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    started = time.perf_counter()
    with console.progress(f"profile {model}", samples) as bar:
        result = run_profile(
            loaded,
            score=score,
            texts=texts,
            source=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            journal=state.journal_path(path),
            resume=resume,
            on_step=bar.reach,
            probe=probe,
        )
    result.save(path, ctx.meta[options.COMMAND_LINE])
    state.journal_path(path).unlink(missing_ok=True)
    if result.calibration.samples < samples:
        console.notice(f"the text gave {result.calibration.samples} samples, not {samples}")
    show_profile(result, path)
    _plot(result, plot)
    console.emit_json(
        {
            "command": "profile",
            "model": result.model.id,
            "profile": path,
            "score": score,
            "samples": result.calibration.samples,
            "seconds": time.perf_counter() - started,
            "layers": score_json(result.score(score)),
        }
    )


def _check_outputs(path: Path, plot: Path | None) -> None:
    """Raise OutputError before any work if the profile or its picture could not be written."""
    from ..files import check_writable

    check_writable(path)
    if plot is not None:
        from .plots import check_plot

        check_plot(plot)


def _probe(score: str, checkpointing: bool | None) -> Probe:
    """The probe by name. Raises KvmixError if there is none, or it has no checkpointing to switch."""
    from ..profiling import get_probe

    probe: Any = get_probe(score)
    if checkpointing is None:
        return probe
    if not hasattr(probe, "checkpointing"):
        raise KvmixError(f"score '{score}' has no backward pass; leave out --checkpointing")
    return replace(probe, checkpointing=checkpointing)


def _plot(profile: Profile, plot: Path | None) -> None:
    if plot is not None:
        from .plots import plot_profiles

        console.notice(f"plot: {plot_profiles([(profile.model.id, profile)], plot)}")
