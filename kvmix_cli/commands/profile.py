"""`kvmix profile MODEL`: measure how important each layer's keys and values are."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console, state
from ..counting import counted
from ..errors import KvmixError
from ..files import after_saving
from ..ranks import current
from .dry_run import DryRunFlag, show_work
from .options import COMMAND_LINE, CommonOptions, Encoding, LoadingOptions, ModelOptions, expand
from .ranks import TensorParallel
from .values import (
    count_option,
    output_option,
    parse_bits,
    parse_budgets,
    parse_groups,
    parse_longer,
    parse_names,
    parse_window,
)

if TYPE_CHECKING:
    from ..models.loading import LoadedModel
    from ..profile import LongerSamples, Profile
    from ..profiling import ProbeOptions

GRANULARITIES = ("layer", "head")


@dataclass(frozen=True)
class ProfileOptions:
    """The scores to measure, the text to measure them on, and where the profile goes."""

    score: Annotated[
        Any,
        typer.Option(
            metavar="LIST",
            parser=parse_names,
            help="What to measure: grad-norm (the paper), taylor, fisher, fisher-metric, error, loss, kl; with commas.",
        ),
    ] = "grad-norm"
    bits: Annotated[
        Any, typer.Option(metavar="LIST", parser=parse_bits, help="Widths of curves [default: 1,2,3,4,8].")
    ] = None
    group_size: Annotated[
        Any, typer.Option(metavar="LIST", parser=parse_groups, help="Their groups [default: 32,64,128].")
    ] = None
    encode: Encoding = None
    window: Annotated[
        str | None,
        typer.Option(
            metavar="W",
            parser=parse_window,
            help="Last tokens that fisher-metric leaves out: recent:N, or none for an engine, which codes every token "
            "at once [default: recent:128].",
        ),
    ] = None
    frame: Annotated[
        Any,
        count_option(
            "Positions that share one origin of the rotation of keys, for fisher-metric: fewer may lose less, and take "
            "more time [default: 1024]."
        ),
    ] = None
    evict: Annotated[
        Any,
        typer.Option(
            metavar="LIST", parser=parse_budgets, help="Shares of tokens whose eviction is measured (kl, loss)."
        ),
    ] = None
    granularity: Annotated[str, typer.Option(metavar="WHAT", help="layer, or head: also score KV heads.")] = "layer"
    calibration: Annotated[
        str, typer.Option(metavar="TEXT", help="builtin, a file, a folder, a .jsonl, or hub:NAME[:CONFIG[:SPLIT]].")
    ] = "builtin"
    samples: Annotated[
        Any,
        count_option("Samples of text [default: 30; 20 for fisher-metric alone]."),
    ] = None
    seq_len: Annotated[int, count_option("Tokens of a sample.", least=2)] = 1024
    longer: Annotated[
        Any,
        typer.Option(
            metavar="NxTOKENS",
            parser=parse_longer,
            help="Further samples, longer than --seq-len, for fisher-metric: 3x4096 loses less in long contexts.",
        ),
    ] = None
    out: Annotated[
        Path | None,
        output_option("Where to write [default: profiles/<org>--<model>/profile.yaml]."),
    ] = None
    plot: Annotated[Path | None, output_option("Also draw the scores by layer.", metavar="FILE.png")] = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted profile stopped.")] = False
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a score even if it was measured on more text, or on other text.")
    ] = False
    dry_run: DryRunFlag = False
    tensor_parallel: TensorParallel = False
    checkpointing: Annotated[
        bool | None,
        typer.Option("--checkpointing/--no-checkpointing", help="Save memory for time [default: for large models]."),
    ] = None

    def __post_init__(self) -> None:
        """Raise KvmixError for an unknown granularity."""
        if self.granularity not in GRANULARITIES:
            raise KvmixError(f"no granularity '{self.granularity}'; there is {', '.join(GRANULARITIES)}")

    @property
    def longer_samples(self) -> LongerSamples | None:
        """Return the samples that `longer` asks for."""
        from ..profile import LongerSamples

        return LongerSamples(samples=self.longer[0], seq_len=self.longer[1]) if self.longer else None


@expand
def profile(
    ctx: typer.Context, what: ProfileOptions, which: ModelOptions, loading: LoadingOptions, common: CommonOptions
) -> None:
    """Measure how important each layer's keys and values are, on calibration text.

    Scores are added to the profile that is there; those of the same name are replaced.
    """
    model = which.needed
    path = what.out or state.profile_path(model)
    _check_outputs(path, what.plot)
    from ..plan import windows
    from ..plan.tensors.moments import FRAME
    from ..profiling import ProbeOptions, check_longer, default_samples, find_probes, profile_lock
    from ..studies.profiles import existing_profile, require_same_model
    from ..texts import load_texts

    per_head = what.granularity == "head"
    window = None if what.window is None else windows.parse_window(what.window)
    frame, evict = what.frame or FRAME, what.evict or ()
    how = ProbeOptions(what.bits, what.group_size, what.encode, window, evict, per_head, what.checkpointing, frame)
    how.check(find_probes(what.score))
    check_longer(find_probes(what.score), what.seq_len, what.longer_samples)
    if what.samples is None:
        what = replace(what, samples=default_samples(what.score))
    texts = load_texts(what.calibration, seed=loading.seed)
    if what.dry_run:
        from ..studies.dry_run import profile_work

        sizes = (what.samples, what.seq_len, what.longer_samples, loading.seed)
        writes = [path, *([what.plot] if what.plot else [])]
        load = partial(loading.load, model, which.revision)
        show_work("profile", profile_work(model, load, what.score, how, texts, *sizes, writes))
        return
    ranks = current()
    if ranks.leads:
        ctx.with_resource(profile_lock(path))  # until the profile is saved
    before = existing_profile(path)
    loaded = loading.load(model, which.revision, tensor_parallel=what.tensor_parallel)
    if before is not None:
        require_same_model(before, loaded.info, path)
    _check_replaced(before, what, loading.seed, path)
    started = time.perf_counter()
    result = _measure(loaded, model, texts, what, how, path, loading.seed, before)
    if not ranks.leads:
        return
    _save(result, before, path, ctx.meta[COMMAND_LINE])
    with after_saving(
        f"the profile is saved: `{shlex.join(['kvmix', 'inspect', str(path)])}` shows it, --plot draws it"
    ):
        _show(result, what, path, time.perf_counter() - started)


def _check_outputs(path: Path, plot: Path | None) -> None:
    """Raise OutputError before any work if the profile or its picture could not be written."""
    from ..files import check_writable

    check_writable(path)
    if plot is not None:
        from ..reporting.plots.plans import check_plot

        check_plot(plot)


def _check_replaced(before: Profile | None, what: ProfileOptions, seed: int, path: Path) -> None:
    """Raise KvmixError if a score would be replaced by one that was measured on less text, or on other text."""
    scores = {} if before is None or what.replace else before.scores
    for name, score in scores.items():
        text = score.calibration
        is_less = what.samples < text.samples or what.seq_len < text.seq_len or _has_less(what.longer, text.longer)
        is_other = (what.calibration, seed) != (text.source, text.seed)
        if name in what.score and (is_less or is_other):
            raise KvmixError(
                f"{path} has {name} over {text.amount} of {text.source} (seed {text.seed}), which {what.samples} of "
                f"{what.seq_len} of {what.calibration} (seed {seed}) would replace: add --replace, or name another "
                "file with --out"
            )


def _has_less(longer: tuple[int, int] | None, before: LongerSamples | None) -> bool:
    """Return whether fewer or shorter samples are asked for than the longer ones that a score was measured on."""
    samples, seq_len = longer or (0, 0)
    return before is not None and (samples < before.samples or seq_len < before.seq_len)


def _measure(
    loaded: LoadedModel,
    model: str,
    texts: list[str],
    what: ProfileOptions,
    how: ProbeOptions,
    path: Path,
    seed: int,
    before: Profile | None,
) -> Profile:
    from ..profiling import run_profile
    from ..studies.coded import with_coded_losses

    journal = state.journal_path(path)
    if journal.exists() and not what.resume:
        console.notice(f"{journal} is of an unfinished profile, which is started over; --resume goes on with one")
    with console.progress(f"profile {model}", what.samples + (what.longer or (0,))[0]) as bar:
        result = run_profile(
            loaded,
            what.score,
            texts=texts,
            source=what.calibration,
            samples=what.samples,
            seq_len=what.seq_len,
            longer=what.longer_samples,
            seed=seed,
            options=how,
            journal=journal,
            moments=state.moments_path(path),
            resume=what.resume,
            before=None if before is None or what.replace else before.scores,
            on_step=bar.reach,
        )
    if not current().leads:
        return result
    return with_coded_losses(result, loaded, texts, path.parent, say=console.notice, progress=console.progress)


def _save(result: Profile, before: Profile | None, path: Path, command: str) -> None:
    """Write the scores, with those that the file has already, and say which these are."""
    from ..studies.profiles import save_scores

    if kept := save_scores(result, before, path, command):
        console.notice(f"{path} had {', '.join(before.scores if before else ())} and keeps {', '.join(kept)}")


def _show(result: Profile, what: ProfileOptions, path: Path, seconds: float) -> None:
    """Show the scores; `score` and `layers` of the JSON object are those of the first one."""
    from ..reporting.tables.outliers import outlier_notices
    from ..reporting.tables.plans import outliers_json, profile_tables, score_json
    from ..studies.spectrum import measure_spectra

    text = next(iter(result.scores.values())).calibration
    samples, longer = text.samples, text.longer
    if samples < what.samples:
        console.notice(f"the text gave {counted(samples, 'sample')}, not {what.samples}")
    if longer is not None and longer.samples < what.longer[0]:
        console.notice(f"the text gave {counted(longer.samples, 'longer sample')}, not {what.longer[0]}")
    for table in profile_tables(result, path, ascii_only=not console.is_unicode()):
        console.table(*table)
    for spectrum in measure_spectra(result, path.parent):
        for sentence in spectrum.notices:
            console.notice(sentence)
    for notice in outlier_notices(result):
        console.notice(notice)
    if what.plot is not None:
        from ..reporting.plots.plans import plot_profiles

        console.notice(f"plot: {plot_profiles([(result.model.id, result)], what.plot)}")
    scores = {name: {"seconds": each.seconds, "layers": score_json(each)} for name, each in result.scores.items()}
    first = next(iter(scores))
    head = {"command": "profile", "model": result.model.id, "profile": path, "score": first, "samples": samples}
    console.emit_json(
        {**head, "seconds": seconds, "layers": scores[first]["layers"], "scores": scores, **outliers_json(result)}
    )
