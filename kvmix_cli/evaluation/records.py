"""Records of samples as `samples.jsonl` keeps them: a schema for each task, without torch.

Every record has the tokens that were scored and the tokens that attention read. Fields that a schema does not name are
kept as they are, so that a task without a schema of its own loses nothing.
"""

from __future__ import annotations

import functools
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import NotRequired, TypedDict

from ..cache.subject import AttendedPairs

MOST = 2**62
Count = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(ge=1, le=MOST)]
Amount = Annotated[float, Field(ge=0, le=float(MOST))]
Seconds = Annotated[float, Field(gt=0, le=float(MOST))]


@with_config(ConfigDict(extra="allow", allow_inf_nan=False))
class SampleRecord(TypedDict):
    """The measurement of one sample.

    Attributes:
        tokens: tokens that were scored, or generated.
        seconds: time it took; in files only.
    """

    tokens: Count
    attended: AttendedPairs
    seconds: NotRequired[Amount]


class PerplexityRecord(SampleRecord):
    """One document: the negative log-likelihood of its scored tokens, in nats.

    The unquantized cache's record, and those of older versions, lack what compares with it.

    Attributes:
        first: position of the first scored token in its document, counted from 0.
        kl: KL(unquantized || subject) of each scored token's prediction, in nats.
        changed: the scored tokens, counted from 0, whose most likely token is not the unquantized cache's.
    """

    nll: float
    first: NotRequired[Count]
    kl: NotRequired[list[Amount]]
    changed: NotRequired[list[Count]]


class RecalledValue(TypedDict):
    """One value of a recall exercise.

    Attributes:
        depth: share of the text before its statement, 0 to 1.
        distance: tokens from its statement to its question.
    """

    name: NotRequired[str]
    value: NotRequired[str]
    depth: Annotated[float, Field(ge=0, le=1)]
    distance: Count
    recalled: bool


class RecallRecord(SampleRecord):
    """One recall exercise of `context` tokens: its values, and how many of them were recalled."""

    context: Count
    values: Count
    recalled: Count
    answers: list[RecalledValue]


class MemoryRecord(SampleRecord):
    """Bytes of one cache.

    Attributes:
        element_bytes: bytes of an unquantized element.
        measured: bytes in use.
        allocated: bytes with the room to grow.
        peak: the most bytes above the model; absent where that cannot be measured.
        unquantized: present and true for the unquantized cache.
        planned: bytes in use by the layers of the plan.
        predicted: bytes that the plan predicts for these layers.
    """

    element_bytes: Count
    measured: Count
    allocated: Count
    peak: NotRequired[Count]
    unquantized: NotRequired[bool]
    planned: NotRequired[Count]
    predicted: NotRequired[Count]


class ThroughputRecord(SampleRecord):
    """One repeat of a context and batch, or all repeats of the largest batch.

    Attributes:
        context: tokens of a prompt.
        new_tokens: tokens of each row's answer.
        prompt_seconds: of each repeat; none if memory ran out.
        decode_seconds: of each repeat, without the first token.
        largest: present and true for the largest batch that fits.
        first_steps_fit: the largest batch whose prompt and first decoded token fit.
        tried: bytes that each batch took, None where memory ran out.
    """

    context: Positive
    batch: Count
    new_tokens: Count
    out_of_memory: bool
    prompt_seconds: list[Seconds]
    decode_seconds: list[Seconds]
    cache_bytes: Count | None
    peak_bytes: Count | None
    attention: str | None
    largest: NotRequired[bool]
    first_steps_fit: NotRequired[Count]
    tried: NotRequired[dict[str, Count | None]]


class LongBenchRecord(SampleRecord):
    """One prompt of LongBench and its scored answer.

    Attributes:
        sample: data set and line.
        length: of the text in words, by which LongBench-E is binned.
        cut_tokens: tokens that were cut out of the prompt's middle.
        prediction: the text of the answer.
        score: 0 to 100.
    """

    sample: str
    dataset: str
    length: Count
    prompt_tokens: Positive
    cut_tokens: Count
    prediction: str
    score: Annotated[float, Field(ge=0, le=100)]


class HarnessRecord(SampleRecord):
    """One request of lm-eval and its answer.

    Attributes:
        request: name of the request.
        answer: text, or a log-likelihood in nats and whether greedy decoding would give the same tokens.
    """

    request: str
    answer: str | list[float | bool]


SCHEMAS: dict[str, type[SampleRecord]] = {
    "perplexity": PerplexityRecord,
    "recall": RecallRecord,
    "passkey": RecallRecord,
    "kv_retrieval": RecallRecord,
    "multi_hop": RecallRecord,
    "code_completion": RecallRecord,
    "memory": MemoryRecord,
    "throughput": ThroughputRecord,
    "longbench": LongBenchRecord,
    "longbench-e": LongBenchRecord,
}
"""Schemas by task; all other tasks have that of `SampleRecord`."""


@functools.cache
def record_form(task: str = "") -> TypeAdapter[SampleRecord]:
    """Return the schema of a task's records, or of what all records have, as pydantic reads and writes them."""
    return TypeAdapter(SCHEMAS.get(task.partition(":")[0], SampleRecord))
