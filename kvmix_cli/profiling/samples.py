"""The samples of a profile: many of one length and, for moments of long contexts, a few longer ones."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import KvmixError, TextError
from ..models.loading import LoadedModel
from ..profile import Calibration, LongerSamples
from ..texts.tokens import Samples, cut_samples
from .identity import describe_samples
from .probe import MetricProbe, Probe


def check_longer(probes: Sequence[Probe], seq_len: int, longer: LongerSamples | None) -> None:
    """Raise KvmixError for longer samples that are no longer than the others, or that a probe has no use for."""
    if longer is None:
        return
    if others := [probe.name for probe in probes if not isinstance(probe, MetricProbe)]:
        raise KvmixError(
            f"score {others[0]} has no use for longer samples; use --score fisher-metric alone, or leave out --longer"
        )
    if longer.seq_len <= seq_len:
        raise KvmixError(
            f"samples of {longer.seq_len} tokens are no longer than the others, of {seq_len}: use "
            f"--longer {longer.samples}x{4 * seq_len}, or a smaller --seq-len"
        )


def choose_samples(
    loaded: LoadedModel,
    texts: Sequence[str],
    source: str,
    samples: int,
    seq_len: int,
    longer: LongerSamples | None,
    seed: int,
    shortest: int,
) -> tuple[Samples, Calibration]:
    """Return the token ids of all samples, the longer ones last, and the record of them.

    Args:
        texts: documents; `source` is their name in the record.
        shortest: tokens that a sample must have for the scores that are measured on it.

    Raises:
        TextError: if there is not enough text, or the model does not take so many tokens.
    """
    limit = loaded.max_length
    if longer is not None and limit is not None and longer.seq_len > limit:
        raise TextError(
            f"the model takes at most {limit} tokens, not {longer.seq_len}: use --longer {longer.samples}x{limit}"
        )

    def cut(count: int, tokens: int) -> Samples:
        return cut_samples(loaded.tokenizer, texts, count, tokens, seed, shortest=shortest, max_length=limit)

    chosen = cut(samples, seq_len)
    if longer is None:
        return chosen, describe_samples(chosen, source, seq_len, seed)
    further = [ids for ids in cut(longer.samples, longer.seq_len) if len(ids) > seq_len]
    if not further:
        raise TextError(
            f"no document of {source} has more than {seq_len} tokens: give longer text, or leave out --longer"
        )
    found = LongerSamples(samples=len(further), seq_len=longer.seq_len)
    return [*chosen, *further], describe_samples([*chosen, *further], source, seq_len, seed, found)
