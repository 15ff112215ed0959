"""`kvmix profile MODEL`: how important are each layer's keys and values?"""

from __future__ import annotations

import time
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console, state
from ..errors import KvmixError
from . import options

if TYPE_CHECKING:
    from ..plan import ModelInfo
    from ..profile import Profile

GRANULARITIES = ("layer", "head")


def profile(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder or builtin:tiny.")],
    score: Annotated[
        Any,
        typer.Option(
            metavar="LIST",
            parser=options.parse_names,
            help="What to measure: grad-norm (the paper), taylor, fisher, error, loss, kl; several with commas.",
        ),
    ] = "grad-norm",
    bits: Annotated[
        Any, typer.Option(metavar="LIST", parser=options.parse_bits, help="Widths of curves [default: 1,2,3,4,8].")
    ] = None,
    group_size: Annotated[
        Any, typer.Option(metavar="LIST", parser=options.parse_groups, help="Their groups [default: 32,64,128].")
    ] = None,
    granularity: Annotated[str, typer.Option(metavar="WHAT", help="layer, or head: also score KV heads.")] = "layer",
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
    """Measure how important each layer's keys and values are, on calibration text.

    Scores are added to the profile that is there; those of the same name are replaced.
    """
    path = out or state.profile_path(model)
    _check_outputs(path, plot)
    if granularity not in GRANULARITIES:
        raise KvmixError(f"no granularity '{granularity}'; there is {', '.join(GRANULARITIES)}")
    from ..models.loading import load_model
    from ..profiling import ProbeOptions, find_probes, profile_lock, run_profile
    from ..reporting.tables import profile_tables
    from ..texts import load_texts

    how = ProbeOptions(bits, group_size, per_head=granularity == "head", checkpointing=checkpointing)
    how.check(find_probes(score))
    ctx.with_resource(profile_lock(path))  # until the profile is saved
    before = _existing(path)
    texts = load_texts(calibration, seed=seed)
    loaded = load_model(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if before is not None:
        _require_same_model(before, loaded.info, path)
    started = time.perf_counter()
    with console.progress(f"profile {model}", samples) as bar:
        result = run_profile(
            loaded,
            score,
            texts=texts,
            source=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            options=how,
            journal=state.journal_path(path),
            resume=resume,
            on_step=bar.reach,
        )
    _save(result, before, path, ctx.meta[options.COMMAND_LINE])
    measured = next(iter(result.scores.values())).calibration.samples
    if measured < samples:
        console.notice(f"the text gave {measured} samples, not {samples}")
    for table in profile_tables(result, path, ascii_only=not console.is_unicode()):
        console.table(*table)
    _plot(result, plot)
    _emit(result, path, measured, time.perf_counter() - started)


def _check_outputs(path: Path, plot: Path | None) -> None:
    """Raise OutputError before any work if the profile or its picture could not be written."""
    from ..files import check_writable

    check_writable(path)
    if plot is not None:
        from ..reporting.plots import check_plot

        check_plot(plot)


def _existing(path: Path) -> Profile | None:
    """The profile that is there. Raises KvmixError if it cannot be read, and so not be added to."""
    from ..errors import DocumentError
    from ..profile import Profile

    if not path.exists():
        return None
    try:
        return Profile.load(path)
    except DocumentError as error:
        raise KvmixError(f"{error}; no score can be added to it: remove it, or name another file with --out") from error


def _require_same_model(profile: Profile, model: ModelInfo, path: Path) -> None:
    from ..models.sources import canonical_id

    if profile.model.model_copy(update={"id": canonical_id(profile.model.id)}) != model:
        raise KvmixError(
            f"{path} is the profile of another model ({profile.model.id}, or another revision or configuration of it); "
            "name another file with --out"
        )


def _save(result: Profile, before: Profile | None, path: Path, command: str) -> None:
    """Write the scores, with those that the file has already, and say which these are."""
    old = {} if before is None else before.scores
    if kept := [name for name in old if name not in result.scores]:
        console.notice(f"{path} had {', '.join(old)} and keeps {', '.join(kept)}")
        command = f"{_head(path)}\n{command}"
    result.model_copy(update={"scores": {**old, **result.scores}}).save(path, command)
    state.journal_path(path).unlink(missing_ok=True)


def _head(path: Path) -> str:
    """The commands that a file says it was made by."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line[2:] for line in takewhile(lambda line: line.startswith("# "), lines))


def _emit(result: Profile, path: Path, samples: int, seconds: float) -> None:
    """The JSON result; `score` and `layers` are those of the first score."""
    from ..reporting.tables import score_json

    scores = {name: {"seconds": each.seconds, "layers": score_json(each)} for name, each in result.scores.items()}
    first = next(iter(scores))
    head = {"command": "profile", "model": result.model.id, "profile": path, "score": first, "samples": samples}
    console.emit_json({**head, "seconds": seconds, "layers": scores[first]["layers"], "scores": scores})


def _plot(profile: Profile, plot: Path | None) -> None:
    if plot is not None:
        from ..reporting.plots import plot_profiles

        console.notice(f"plot: {plot_profiles([(profile.model.id, profile)], plot)}")
