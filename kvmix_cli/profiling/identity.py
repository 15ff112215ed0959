"""Identity of a score: everything that its numbers depend on, so that no score is replaced by another kind of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from kvmix_kernels.layout import KINDS

from ..errors import KvmixError
from ..journal import HASH_DIGITS, short_hash
from ..models.loading import LoadedModel
from ..plan import HeadGeometry
from ..plan.tensors.moments import FRAME
from ..profile import Calibration, LongerSamples, Score, ScoreSetup
from .grid import Grid
from .measure import ProbeOptions
from .probe import MetricProbe, Probe


@dataclass(frozen=True)
class ScoreSettings:
    """Settings that the numbers of one score depend on.

    Attributes:
        score: its name.
        weights: revision of the model, checksum of its configuration, and dtype.
        choices: choices of the curves of keys and of values, by key; empty without curves.
        setup: cache settings of the curves.
        per_head: whether KV heads are scored, too.
        calibration: the text, with the checksum of its tokens.
        evict: shares whose eviction is measured, too.
    """

    score: str
    weights: tuple[str | None, str | None, str]
    choices: list[list[str]]
    setup: ScoreSetup
    per_head: bool
    calibration: Calibration
    evict: tuple[float, ...] = ()

    @property
    def identity(self) -> str:
        """Return the hash of what must be equal for one score to replace another, for the score's `identity`.

        The amount of text, the choices and the heads are left out: there may be more of them.
        """
        data = (self.score, self.weights, self.setup, self.calibration.source, self.calibration.seed)
        return short_hash(data)


def describe_samples(
    samples: Sequence[Sequence[int]], source: str, seq_len: int, seed: int, longer: LongerSamples | None = None
) -> Calibration:
    """Return the record that a profile keeps of its samples, token ids.

    Args:
        longer: the last so many samples are longer than the others.
    """
    digest = hashlib.sha256()
    for ids in samples:
        digest.update(np.array([len(ids), *ids], dtype="<i8").tobytes())
    return Calibration(
        source=source,
        sha256=digest.hexdigest(),
        samples=len(samples) - (longer.samples if longer else 0),
        seq_len=seq_len,
        longer=longer,
        seed=seed,
        tokens=sum(map(len, samples)),
    )


def identify(loaded: LoadedModel, probe: Probe, options: ProbeOptions, calibration: Calibration) -> ScoreSettings:
    """Return what the numbers of a probe with these options, on this text, depend on."""
    grid, info = options.grid(probe), loaded.info
    setup = ScoreSetup() if grid is None else _setup(grid)
    if isinstance(probe, MetricProbe) and options.frame != FRAME:
        setup["frame"] = options.frame
    by_heads = [curve_choices(grid, heads) for heads in info.geometries]
    return ScoreSettings(
        score=probe.name,
        weights=(info.revision, info.config_sha256, loaded.dtype),
        choices=[sorted({key for choices in by_heads for key in choices[place]}) for place in range(len(KINDS))],
        setup=setup,
        per_head=options.scores_heads(probe),
        evict=options.shares(probe),
        calibration=calibration,
    )


def curve_choices(grid: Grid | None, heads: HeadGeometry) -> list[list[str]]:
    """Return the choices of the curves of keys and of values in a layer with these heads; none without a grid."""
    return [[] if grid is None else sorted(grid.layouts(kind, heads.dim(kind))) for kind in KINDS]


def check_not_lost(before: Mapping[str, Score], now: Sequence[ScoreSettings]) -> None:
    """Raise KvmixError if scores that are there would be replaced by scores that say less, or something else.

    A score of the same settings may be measured again, also on more of the same text. Scores of earlier versions,
    which have no identity, are compared by what their file says.
    """
    for settings in now:
        old = before.get(settings.score)
        lost = [] if old is None else list(_lost(old, settings))
        if old is not None and old.identity not in ("", settings.identity) and not lost:
            lost = ["of another dtype, revision or text"]
        if lost:
            raise KvmixError(
                f"the profile has {settings.score} {' and '.join(lost)}, which would be replaced: add --replace, or "
                "name another file with --out"
            )


def _lost(old: Score, now: ScoreSettings) -> Iterator[str]:
    """Yield what a score has that a new one would not have."""
    was, text = old.calibration, now.calibration
    is_same_size = (was.samples, was.seq_len, was.longer) == (text.samples, text.seq_len, text.longer)
    if is_same_size and was.sha256 != text.sha256:
        yield f"over other text of {was.source} ({was.sha256[:HASH_DIGITS]}, now {text.sha256[:HASH_DIGITS]})"
    missing = sorted({*old.choices[0], *old.choices[1]} - {*now.choices[0], *now.choices[1]})
    if missing:
        yield f"at {', '.join(missing)}"
    if shares := sorted({share for layer in old.layers.values() for share in layer.evict} - set(now.evict)):
        yield f"with {', '.join(f'{share:g}' for share in shares)} evicted"
    if not now.per_head and any(layer.k.heads is not None for layer in old.layers.values()):
        yield "by KV head"
    changed = [f"{name} {value}" for name, value in old.setup.items() if now.setup.get(name) != value]
    if old.setup and "encode" in now.setup and "encode" not in old.setup:
        changed.append("encode minmax")
    if changed:
        yield f"with {', '.join(changed)}"


def _setup(grid: Grid) -> ScoreSetup:
    cache = grid.cache
    setup: ScoreSetup = {
        "page": cache.page,
        "sink": cache.sink,
        "window": cache.window.short,
        "scale_dtype": cache.scale_dtype,
    }
    if cache.encode != "minmax":
        setup["encode"] = cache.encode
    return setup
