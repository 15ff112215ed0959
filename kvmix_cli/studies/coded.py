"""Transform codes read back through the real cache: how much more they lose than moments promise."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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
REACH = 2
"""Samples of the calibration that follow each other in a document, if there are so many and the model takes them. What
is lost grows with the context, so it is measured up to the end of the first sample and up to that of the last."""
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
    """Return promised and measured losses of a plan for each number of exact tokens, in contexts of one or two lengths.

    These are the documents' own length and, if that is longer, that of the calibration's samples. Moments that count
    all pairs are for engines, which keep no exact tokens: their plan is read as an engine holds it.

    Args:
        documents: token ids; of longer ones only as many count as the shortest has.
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
        length = min(map(len, documents))
        contexts = sorted({min(length, score.calibration.seq_len), length})
        losses = []
        for ids in documents:
            losses.append(_divergences(loaded, subjects, ids[:length], contexts))
            step()
    measured = np.mean(losses, axis=0)
    return [
        CodedLoss(
            bits=BITS,
            exact=exact,
            context=context,
            predicted=plan.provenance["predicted_loss"],
            measured=float(measured[row, column]),
        )
        for column, context in enumerate(contexts)
        for row, (exact, plan) in enumerate(plans.items())
    ]


def _divergences(
    loaded: LoadedModel, subjects: Sequence[Subject], ids: Sequence[int], contexts: Sequence[int]
) -> list[list[float]]:
    """Return the mean divergence of each cache on the first tokens of a document, as many as each context has.

    The mean is in nats a token that is predicted after a prompt.

    Raises:
        EvaluationError: if predictions are not finite, or those of a cache are the unquantized cache's.
    """
    import torch

    from ..cache.subject import Subject
    from ..decoding.feed import feed, prefill
    from ..evaluation.alongside import divergence

    first = min(PROMPT, len(ids) - 2)
    found: list[list[torch.Tensor]] = [[] for _ in subjects]
    with torch.inference_mode():
        caches = [each.cache(loaded.config, reserve=len(ids)) for each in (Subject(), *subjects)]
        for cache in caches:
            prefill(loaded, cache, ids[:first])
        for (_, reference), *others in zip(
            *(feed(loaded, cache, ids[first:-1], STEP) for cache in caches), strict=True
        ):
            for parts, (_, logits) in zip(found, others, strict=True):
                parts.append(divergence(reference, logits))
    means = [[torch.cat(parts)[: context - first - 1].mean().item() for context in contexts] for parts in found]
    if not all(0 < mean < math.inf for each in means for mean in each):
        whole = ", ".join(f"{each[-1]:g}" for each in means)
        raise EvaluationError(f"plans of {BITS:g} bits diverge by {whole} nats a token")
    return means


def _in_engine(plan: Plan) -> Subject:
    from ..cache.in_engine import EngineBaseline
    from ..cache.subject import Subject

    return Subject("in-engine", baseline=EngineBaseline("in-engine", plan))


def _with_coded(profile: Profile, coded: list[CodedLoss]) -> Profile:
    """Return a profile whose moments have these losses."""
    score = profile.score(TRANSFORM_SCORE).model_copy(update={"coded": coded})
    return profile.model_copy(update={"scores": {**profile.scores, TRANSFORM_SCORE: score}})


def _documents(profile: Profile, loaded: LoadedModel, texts: Sequence[str]) -> list[list[int]]:
    """Return documents of `REACH` samples each, of those that follow the samples of the moments, which lose less.

    If the text has no more, a document has one sample, or is a sample of the moments.

    Raises:
        TextError: if the text has no samples.
    """
    from ..texts.tokens import cut_samples, opening

    text = profile.score(TRANSFORM_SCORE).calibration
    wanted, limit = text.samples + DOCUMENTS * REACH, loaded.max_length
    found = cut_samples(loaded.tokenizer, texts, wanted, text.seq_len, text.seed, max_length=limit)
    others = [ids for ids in found[text.samples :] if len(ids) == text.seq_len]
    if not others:
        return found[:DOCUMENTS]
    if len(others) < DOCUMENTS * REACH or (limit is not None and limit < REACH * text.seq_len):
        return others[:DOCUMENTS]
    skipped = len(opening(loaded.tokenizer))
    parts = [others[start : start + REACH] for start in range(0, DOCUMENTS * REACH, REACH)]
    return [[*first, *(token for ids in rest for token in ids[skipped:])] for first, *rest in parts]
