"""Sums over documents of what a basis is made of, and their files while a profile is unfinished.

All sums are float64: keys may have means of several hundred beside deviations of one (Qwen2), and a covariance is a
difference of squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..cache.rotary import turned
from ..errors import DocumentError, first_sentence
from ..files import write_bytes
from ..plan.moments import FRAME, LayerMoments, Rope, TensorMoments
from .change import LayerAttention


class MomentSums:
    """Sums over the tokens of some documents, by layer.

    Args:
        ropes: rotation of the keys of every layer that is measured, None where keys are left as they are.
    """

    def __init__(self, ropes: Mapping[int, Rope | None]) -> None:
        self._ropes = ropes
        self._sums: dict[str, Tensor] = {}

    @property
    def counts(self) -> tuple[int, int]:
        """Return the predictions that have read something packed, and the tokens that one of them found packed."""
        first = min(self._ropes)
        predictions, packed = (int(self._sums[f"{first}.{name}"]) for name in ("predictions", "packed"))
        return predictions, packed

    def add(self, layer: LayerAttention) -> None:
        """Add one layer of a document."""
        index, sink = layer.index, layer.grid.cache.sink
        for kind, states in layer.states.items():
            gradients, kept = layer.gradients[kind][0].cpu().double(), states[0, :, sink:].cpu().double()
            rope = self._ropes[index] if kind == "key" else None
            if rope is not None:
                gradients, kept = _to_frame(gradients, rope), _to_frame(kept, rope)
            self._add(f"{index}.{kind}.gradients", gradients.mT @ gradients)
            self._add(f"{index}.{kind}.squares", kept.mT @ kept)
            self._add(f"{index}.{kind}.states", kept.sum(1))
        readers, packed = layer.readers, layer.packed
        self._add(f"{index}.predictions", torch.tensor(readers.stop - readers.start))
        self._add(f"{index}.packed", torch.tensor(packed.stop - packed.start))
        self._add(f"{index}.tokens", torch.tensor(kept.shape[1]))

    def layer(self, index: int) -> LayerMoments:
        """Return the moments of one layer, in float64."""
        predictions, tokens = self._sums[f"{index}.predictions"], self._sums[f"{index}.tokens"]

        def moments(kind: str) -> TensorMoments:
            mean = self._sums[f"{index}.{kind}.states"] / tokens
            covariance = self._sums[f"{index}.{kind}.squares"] / tokens - mean[:, :, None] * mean[:, None]
            metric = self._sums[f"{index}.{kind}.gradients"] / predictions
            return TensorMoments(metric.numpy(), covariance.numpy(), mean.numpy())

        return LayerMoments(moments("key"), moments("value"), self._ropes[index])

    def layers(self) -> dict[int, LayerMoments]:
        """Return the moments of all layers."""
        return {index: self.layer(index) for index in self._ropes}

    def merge(self, other: MomentSums) -> None:
        """Add the sums of other documents."""
        for name, value in other._sums.items():
            self._add(name, value)

    def encode(self) -> bytes:
        """Return the sums as the bytes of a safetensors file."""
        return save({name: value.contiguous() for name, value in self._sums.items()})

    def merge_encoded(self, data: bytes) -> None:
        """Add sums that were encoded."""
        for name, value in load(data).items():
            self._add(name, value)

    def save(self, path: Path) -> None:
        """Write a file, whole or not at all. Raises OutputError."""
        write_bytes(path, self.encode())

    def merge_file(self, path: Path) -> None:
        """Add the sums in a file. Raises DocumentError if it is missing or damaged."""
        try:
            self.merge_encoded(path.read_bytes())
        except (OSError, SafetensorError, RuntimeError) as error:
            why = f"cannot resume with this file: {first_sentence(error)}; leave out --resume to start over"
            raise DocumentError(str(path), [why]) from error

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value


class MomentParts:
    """The sums of each finished document of a run, in a file of its own beside the journal; in memory without one.

    A part is written before the record of its document, so that a journal never has a record without its part.
    """

    def __init__(self, journal: Path | None, ropes: Mapping[int, Rope | None], *, resume: bool) -> None:
        self._journal, self._ropes = journal, ropes
        self._total = MomentSums(ropes)
        if journal is not None and not resume:
            remove_parts(journal)

    def keep(self, number: int, sums: MomentSums) -> None:
        """Keep the sums of a document. Raises OutputError."""
        if self._journal is None:
            self._total.merge(sums)
        else:
            sums.save(_part(self._journal, number))

    def total(self, documents: int) -> MomentSums:
        """Return the sums of all documents. Raises DocumentError if one is missing or damaged."""
        if self._journal is not None:
            self._total = MomentSums(self._ropes)
            for number in range(documents):
                self._total.merge_file(_part(self._journal, number))
        return self._total


def remove_parts(journal: Path) -> None:
    """Delete the parts beside a journal."""
    for path in journal.parent.glob(f"{journal.stem}.*.safetensors"):
        path.unlink(missing_ok=True)


def _part(journal: Path, number: int) -> Path:
    """Return the file of a document: `profile.partial.0.safetensors` beside `profile.partial.jsonl`."""
    return journal.with_name(f"{journal.stem}.{number}.safetensors")


def _to_frame(states: Tensor, rope: Rope) -> Tensor:
    """Return keys `[H, T, D]`, the first of them after the sinks, as they are relative to the start of their frame."""
    starts = torch.arange(states.shape[1]) // FRAME * FRAME
    return turned(states, rope, -starts)
