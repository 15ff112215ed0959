"""A row while it is measured, and the warning of one that read nothing quantized."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvmix_kernels.layout import FULL_PRECISION_BITS

from ..cache.subject import Subject
from .records import SampleRecord
from .results import Row
from .run_folder import RunFolder


@dataclass
class UnfinishedRow:
    """One subject's records so far.

    Attributes:
        folder: where its records are kept, if anywhere.
        numbers: the samples that this rank still has records of to come, ascending.
        source: yields these records, and None between their parts.
        topic: of messages about this row between ranks.
        records: one for each sample so far.
        seconds: time that they took.
        error: the reason why it cannot be measured to its end.
        in_hand: time that the sample in hand has taken.
    """

    subject: Subject
    folder: RunFolder | None
    numbers: list[int]
    source: Iterator[SampleRecord | None]
    topic: str
    records: list[SampleRecord] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    in_hand: float = 0.0

    def lacks(self, number: int) -> bool:
        """Return whether the record of a sample is still to come."""
        return self.error is None and self.numbers[:1] == [number]

    def measure_part(self) -> tuple[SampleRecord, float] | None:
        """Measure on to the end of the sample in hand, or of its next part. Raises whatever measuring raises.

        Returns:
            The record, once it is complete, and the seconds that it took.
        """
        start = time.perf_counter()
        try:
            record = next(self.source)
        except StopIteration:
            self.numbers.clear()
            return None
        self.in_hand += time.perf_counter() - start
        if record is None:
            return None
        seconds = round(record.pop("seconds", self.in_hand), 6)  # as it is kept: a resumed run adds up the same
        self.in_hand = 0.0
        self.numbers.pop(0)
        self.records.append(record)
        self.seconds += seconds
        if self.folder is not None:
            self.folder.append(record, seconds)
        return record, seconds


def unread_notices(subject: Subject, row: Row, longer: str) -> list[str]:
    """Return a warning for a row that read nothing quantized; `longer` says how to get longer contexts."""
    if subject == Subject() or row.quantized_share > 0:
        return []
    if subject.plan is not None and subject.plan.evicts:
        return []  # it saves memory by dropping tokens
    if row.nominal_bits >= FULL_PRECISION_BITS:
        if subject.plan is None:
            return []
        reason = "the plan has 16 bits everywhere"
    elif subject.plan is None:
        reason = f"its full-precision window holds the whole context; {longer}"
    else:
        cache = subject.plan.cache
        reason = f"its sink ({cache.sink}), window ({cache.window.kind}) and page ({cache.page}) hold the whole context"
        reason += f"; {longer}"
    return [f"{subject.name}: NOTHING QUANTIZED WAS READ, so {row.task} says nothing about this plan: {reason}"]
