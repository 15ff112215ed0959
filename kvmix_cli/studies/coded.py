"""Transform codes read back through the real cache: how much more they lose than moments promise."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..allocation import TRANSFORM, TRANSFORM_SCORE, Budget, allocate
from ..errors import EvaluationError, KvmixError
from ..plan import Plan
from ..profile import CodedLoss, Profile
from ..state import Say
from .directions import has_directions, read_basis, with_basis

if TYPE_CHECKING:
    from ..cache.subject import Subject
    from ..evaluation.runner import Progress
    from ..models.loading import LoadedModel

EXACT = (1, 2, 4)
"""Exact tokens of a page that are measured."""
BITS = 2.0
"""Nominal bits of the plans. The ratio of measured and promised loss hardly depends on them."""
DOCUMENTS = 2
"""Documents that are read: differences between numbers of exact tokens are alike in all of them."""
STEP, PROMPT = 32, 260
"""Tokens that are fed at a time, and before them; those that a plan's sink, window and first page have by default."""


def with_coded_losses(
    profile: Profile, loaded: LoadedModel, texts: Sequence[str], folder: Path, *, say: Say, progress: Progress
) -> Profile:
    """Return a profile with the losses of plans that are made from its moments, measured on two more documents.

    A profile without moments is returned as it is, and so is one whose plans cannot be measured, after saying why.

    Args:
        texts: the calibration text.
        folder: folder of the file of moments.
    """
    if not has_directions(profile):
        return profile
    try:
        with progress("read transform codes", DOCUMENTS) as step:
            coded = measure_coded(profile, loaded, _documents(profile, loaded, texts), folder, step)
    except KvmixError as error:
        say(f"losses of transform codes are not measured, so those of plans are what moments promise: {error}")
        return profile
    return _with_coded(profile, coded)


def measure_coded(
    profile: Profile,
    loaded: LoadedModel,
    documents: Sequence[Sequence[int]],
    folder: Path,
    step: Callable[[], object] = lambda: None,
) -> list[CodedLoss]:
    """Return promised and measured losses of a plan for each number of exact tokens.

    Moments that count all pairs are for engines, which keep none: their plan is read as an engine holds it.

    Args:
        documents: token ids.
        folder: folder of the file of moments.
        step: called after each document.

    Raises:
        KvmixError: if there is no such plan, or it cannot be measured.
    """
    from ..cache.subject import Subject

    plain = _with_coded(profile, [])
    basis, score = read_basis(plain, folder), plain.score(TRANSFORM_SCORE)
    counts = (0,) if score.is_for_engines else EXACT
    with tempfile.TemporaryDirectory(prefix="kvmix-") as temporary:
        plans = {}
        for exact in counts:
            plan = allocate(plain, Budget(avg_bits=BITS), method=TRANSFORM, basis=basis, exact=exact)
            plans[exact] = with_basis(plan, basis, Path(temporary))
        subjects = [_in_engine(plan) if score.is_for_engines else Subject(plan=plan) for plan in plans.values()]
        losses = []
        for ids in documents:
            losses.append(_divergences(loaded, subjects, ids))
            step()
    measured = dict(zip(counts, map(statistics.fmean, zip(*losses, strict=True)), strict=True))
    return [
        CodedLoss(bits=BITS, exact=exact, predicted=plan.provenance["predicted_loss"], measured=measured[exact])
        for exact, plan in plans.items()
    ]


def _divergences(loaded: LoadedModel, subjects: Sequence[Subject], ids: Sequence[int]) -> list[float]:
    """Return the mean divergence of each cache on a document, in nats a token that is predicted after a prompt.

    Raises:
        EvaluationError: if predictions are not finite, or those of a cache are the unquantized cache's.
    """
    import torch

    from ..cache.subject import Subject
    from ..decoding.feed import feed, prefill
    from ..evaluation.alongside import divergence

    first, totals = min(PROMPT, len(ids) - 2), [0.0] * len(subjects)
    with torch.inference_mode():
        caches = [each.cache(loaded.config, reserve=len(ids)) for each in (Subject(), *subjects)]
        for cache in caches:
            prefill(loaded, cache, ids[:first])
        for (_, reference), *others in zip(
            *(feed(loaded, cache, ids[first:-1], STEP) for cache in caches), strict=True
        ):
            for index, (_, logits) in enumerate(others):
                totals[index] += divergence(reference, logits).sum().item()
    if not all(0 < total < math.inf for total in totals):
        raise EvaluationError(f"plans of {BITS:g} bits diverge by {', '.join(f'{each:g}' for each in totals)} nats")
    return [total / (len(ids) - first - 1) for total in totals]


def _in_engine(plan: Plan) -> Subject:
    from ..cache.in_engine import EngineBaseline
    from ..cache.subject import Subject

    return Subject("in-engine", baseline=EngineBaseline("in-engine", plan))


def _with_coded(profile: Profile, coded: list[CodedLoss]) -> Profile:
    """Return a profile whose moments have these losses."""
    score = profile.score(TRANSFORM_SCORE).model_copy(update={"coded": coded})
    return profile.model_copy(update={"scores": {**profile.scores, TRANSFORM_SCORE: score}})


def _documents(profile: Profile, loaded: LoadedModel, texts: Sequence[str]) -> list[list[int]]:
    """Return the samples that follow those of the moments, which lose less than others; the first if there are no more.

    Raises:
        TextError: if the text has no samples.
    """
    from ..texts.tokens import cut_samples

    text = profile.score(TRANSFORM_SCORE).calibration
    wanted, limit = text.samples + DOCUMENTS, loaded.max_length
    found = cut_samples(loaded.tokenizer, texts, wanted, text.seq_len, text.seed, max_length=limit)
    others = [ids for ids in found[text.samples :] if len(ids) == text.seq_len]
    return others or found[:DOCUMENTS]
